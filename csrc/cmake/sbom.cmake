# ghostgram_install_sbom(): what is inside the binaries beside our own code, as CycloneDX in the wheel's
# .dist-info/sboms (PEP 770). A build without pip has no such folder, and gets none.
function(ghostgram_install_sbom)
  if(NOT SKBUILD_METADATA_DIR)
    return()
  endif()
  set(GHOSTGRAM_VERSION ${SKBUILD_PROJECT_VERSION_FULL})
  list(JOIN GHOSTGRAM_ISAS " " GHOSTGRAM_ISAS)
  if(GHOSTGRAM_CUDA_STATE STREQUAL "on")
    set(SBOM_CUDART_REF ", \"cudart\"")
    set(SBOM_CUDART ",
    {
      \"type\": \"library\",
      \"bom-ref\": \"cudart\",
      \"name\": \"CUDA Runtime\",
      \"version\": \"${CUDAToolkit_VERSION}\",
      \"description\": \"libcudart_static.a, linked in\",
      \"licenses\": [{\"license\": {\"name\": \"CUDA Toolkit EULA\", \"url\": \"https://docs.nvidia.com/cuda/eula\"}}]
    }")
  endif()
  configure_file(${CMAKE_SOURCE_DIR}/csrc/cmake/sbom.cdx.json.in ghostgram.cdx.json @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ghostgram.cdx.json DESTINATION ${SKBUILD_METADATA_DIR}/sboms)
endfunction()
