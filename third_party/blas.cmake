# BLAS: only for the C++ benchmarks, which borrow its GEMM where the extension borrows torch's. Whichever CMake finds
# (Debian: libopenblas-dev, BSD-3-Clause); without one the benchmark's own loop takes over.
function(longgrpo_link_blas target)
  find_package(BLAS QUIET)
  if(NOT BLAS_FOUND)
    message(STATUS "No BLAS found (Debian: libopenblas-dev): the benchmarks use their own GEMM")
    return()
  endif()
  list(GET BLAS_LIBRARIES 0 library)
  get_filename_component(name ${library} NAME_WE)
  target_link_libraries(${target} PRIVATE BLAS::BLAS)
  target_compile_definitions(${target} PRIVATE LONGGRPO_BLAS="${name}")
endfunction()
