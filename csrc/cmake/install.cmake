# Library, header and CMake package; beside the extension module all of it below ghostgram/, where `python -m ghostgram
# --cmakedir` says.
include(CMakePackageConfigHelpers)
if(GHOSTGRAM_PYTHON)
  set(prefix ghostgram/)
  set(CMAKE_INSTALL_INCLUDEDIR include)
  set(CMAKE_INSTALL_LIBDIR lib)
  set(namelink NAMELINK_SKIP) # wheels have no links: it would be a second copy
  install(TARGETS _C DESTINATION ghostgram)
else()
  include(GNUInstallDirs)
endif()
set(package ${prefix}${CMAKE_INSTALL_LIBDIR}/cmake/ghostgram)

install(TARGETS ghostgram EXPORT ghostgram LIBRARY DESTINATION ${prefix}${CMAKE_INSTALL_LIBDIR} ${namelink}
        INCLUDES DESTINATION ${prefix}${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY csrc/include/ghostgram DESTINATION ${prefix}${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT ghostgram FILE ghostgramConfig.cmake NAMESPACE ghostgram:: DESTINATION ${package})
write_basic_package_version_file(ghostgramConfigVersion.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ghostgramConfigVersion.cmake DESTINATION ${package})
