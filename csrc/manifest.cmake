# _sources.sha256 lies beside the libraries and says what they are built of, in sha256sum's format. Tests compare it with
# the tree (scripts/installed.py): a build that is older than its sources is not tested by mistake.
if(CMAKE_SCRIPT_MODE_FILE)  # cmake -D ROOT=... -D OUT=... -P manifest.cmake writes it
  file(GLOB_RECURSE sources RELATIVE ${ROOT} ${ROOT}/csrc/*.h ${ROOT}/csrc/*.cpp ${ROOT}/csrc/*.cuh ${ROOT}/csrc/*.cu
       ${ROOT}/csrc/CMakeLists.txt ${ROOT}/csrc/*.cmake ${ROOT}/third_party/*.cmake)
  foreach(source IN LISTS sources ITEMS CMakeLists.txt)
    file(SHA256 ${ROOT}/${source} digest)
    string(APPEND manifest "${digest}  ${source}\n")
  endforeach()
  file(WRITE ${OUT} "${manifest}")
  return()
endif()

# Taken before the first source is compiled and laid beside the libraries after the last is linked: what is edited in
# between, or does not compile, leaves a build that is older than its sources.
function(longgrpo_manifest)
  set(manifest ${CMAKE_CURRENT_BINARY_DIR}/manifest/_sources.sha256)
  add_custom_target(take_manifest BYPRODUCTS ${manifest} COMMENT "Digests of the sources"
    COMMAND ${CMAKE_COMMAND} -D ROOT=${CMAKE_CURRENT_SOURCE_DIR} -D OUT=${manifest}
                             -P ${CMAKE_CURRENT_FUNCTION_LIST_FILE})
  add_custom_target(lay_manifest ALL COMMENT "Manifest beside the libraries"
    COMMAND ${CMAKE_COMMAND} -E copy_if_different ${manifest} $<TARGET_FILE_DIR:_cpu>)
  if(NOT TARGET _cuda)  # an earlier build may have left one
    add_custom_command(TARGET lay_manifest POST_BUILD
                       COMMAND ${CMAKE_COMMAND} -E rm -f $<TARGET_FILE_DIR:_cpu>/_cuda.so)
  endif()
  foreach(library IN ITEMS _cpu _cuda)
    if(TARGET ${library})
      add_dependencies(lay_manifest ${library})
      get_target_property(parts ${library} LINK_LIBRARIES)
      foreach(target IN LISTS parts ITEMS ${library})
        if(TARGET ${target})
          add_dependencies(${target} take_manifest)
        endif()
      endforeach()
    endif()
  endforeach()
  install(FILES ${manifest} DESTINATION longgrpo)
endfunction()
