# CUDA's compiler (nvcc >= 13): optional. Without it the CPU library is built alone. The runtime is linked statically, so
# the binary needs a driver (>= 580) and nothing else of CUDA.
#
# LONGGRPO_CUDA_ARCHITECTURES: real code for the cards that are named, PTX for later ones. One alone for development.
set(LONGGRPO_CUDA_ARCHITECTURES "75-real;80-real;90a-real;100f-real;120f-real;90-virtual" CACHE STRING
    "CUDA architectures of the kernels")
option(LONGGRPO_CUDA "Build the CUDA kernels where nvcc is found" ON)

set(LONGGRPO_HAVE_CUDA OFF)
if(LONGGRPO_CUDA AND CMAKE_VERSION VERSION_LESS 3.31)
  message(STATUS "longgrpo: cmake ${CMAKE_VERSION} does not know the newer cards (>= 3.31 does: pip install cmake), so "
                 "_cuda.so is left out")
elseif(LONGGRPO_CUDA)
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES ${LONGGRPO_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(LONGGRPO_HAVE_CUDA ON)
  else()
    message(STATUS "longgrpo: no nvcc on PATH, so _cuda.so is left out: CUDA tensors will find no kernel")
  endif()
endif()
