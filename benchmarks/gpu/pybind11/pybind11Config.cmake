# find_package(pybind11) where pybind11 is not installed: torch brings a copy of its headers. PYBIND11_HEADERS names the
# folder that holds them.
function(pybind11_add_module name)
  Python_add_library(${name} MODULE WITH_SOABI ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE ${PYBIND11_HEADERS})
endfunction()
