# torch: its stable C++ ABI only (headers torch/csrc/stable, libtorch.so by name), so that one binary serves every
# torch >= 2.11 and every Python. BSD-3-Clause. Found through the Python that builds.
find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent, end='')"
  OUTPUT_VARIABLE LONGGRPO_TORCH_DIR RESULT_VARIABLE status ERROR_VARIABLE error)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "longgrpo is built against torch >= 2.11, and ${Python_EXECUTABLE} cannot import it: "
                      "install torch first, then build with --no-build-isolation.\n${error}")
endif()

function(longgrpo_torch_library target)
  target_include_directories(${target} SYSTEM PRIVATE ${LONGGRPO_TORCH_DIR}/include)
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
  target_compile_options(${target} PRIVATE -O3 -Wall -Wextra -fvisibility=hidden)
  target_link_directories(${target} PRIVATE ${LONGGRPO_TORCH_DIR}/lib)
  # By name alone, with no path to where it was at build time: torch has loaded it before it loads this library.
  target_link_libraries(${target} PRIVATE -Wl,--no-as-needed -l:libtorch.so -Wl,--as-needed)
  set_target_properties(${target} PROPERTIES PREFIX "" SKIP_BUILD_RPATH ON)
endfunction()
