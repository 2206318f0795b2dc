# CMake package of nsa_torch, for LibTorch programs.
#
#   find_package(nsa_torch REQUIRED)
#   target_link_libraries(program PRIVATE nsa_torch::nsa_torch)        # and #include <nsa.h>
#
# configured with  -Dnsa_torch_DIR="$(python -c 'import nsa_torch; print(nsa_torch.cmake_prefix_path())')"
#
# Torch: the targets of find_package(Torch) when the program has called it before. Otherwise libtorch is linked right from the
# PyTorch that nsa_torch belongs to, because find_package(Torch) of a CUDA build insists on a CUDA toolkit that a program
# without device code has no use for. Torch is looked for in nsa_torch_TORCH_ROOT, Torch_DIR, CMAKE_PREFIX_PATH, beside
# nsa_torch in its site-packages, and last in the Python interpreter on the PATH. nsa_torch holds a library for each minor
# version of torch that it was built for: the one for the torch that was found is taken.
#
# Sets nsa_torch_FOUND, nsa_torch_LIBRARY, nsa_torch_INCLUDE_DIR, nsa_torch_TORCH_ROOT.

# Installed, this file is nsa_torch/share/cmake/nsa_torch/; in a checkout it is cmake/, beside csrc/ and nsa_torch/.
get_filename_component(_nsa_torch_installed "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
get_filename_component(_nsa_torch_checkout "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)

find_path(nsa_torch_INCLUDE_DIR NAMES nsa.h NO_DEFAULT_PATH NO_CACHE
          PATHS "${_nsa_torch_installed}/include" "${_nsa_torch_checkout}/csrc")

macro(_nsa_torch_find_torch)
  set(_nsa_torch_roots "${nsa_torch_TORCH_ROOT}" "$ENV{TORCH_INSTALL_PREFIX}")
  if(Torch_DIR)
    list(APPEND _nsa_torch_roots "${Torch_DIR}/../../..")
  endif()
  foreach(_nsa_torch_prefix IN LISTS CMAKE_PREFIX_PATH)
    list(APPEND _nsa_torch_roots "${_nsa_torch_prefix}" "${_nsa_torch_prefix}/../..")
  endforeach()
  list(APPEND _nsa_torch_roots "${_nsa_torch_installed}/../torch")
  find_path(_nsa_torch_torch_include NAMES torch/csrc/api/include/torch/torch.h NO_DEFAULT_PATH NO_CACHE
            PATHS ${_nsa_torch_roots} PATH_SUFFIXES include)
  if(NOT _nsa_torch_torch_include)
    find_program(_nsa_torch_python NAMES python3 python NO_CACHE)
    if(_nsa_torch_python)
      execute_process(COMMAND "${_nsa_torch_python}" -c "import torch; print(torch.__path__[0])"
                      OUTPUT_VARIABLE _nsa_torch_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      find_path(_nsa_torch_torch_include NAMES torch/csrc/api/include/torch/torch.h NO_DEFAULT_PATH NO_CACHE
                PATHS "${_nsa_torch_root}" PATH_SUFFIXES include)
    endif()
  endif()
  if(_nsa_torch_torch_include)
    get_filename_component(nsa_torch_TORCH_ROOT "${_nsa_torch_torch_include}/.." ABSOLUTE)
  endif()
endmacro()

# libtorch of nsa_torch_TORCH_ROOT as the target nsa_torch::torch. Its ABI flag, where it needs one, stands in TorchConfig.cmake.
macro(_nsa_torch_add_torch)
  add_library(nsa_torch::torch INTERFACE IMPORTED)
  set_target_properties(nsa_torch::torch PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
    "${nsa_torch_TORCH_ROOT}/include;${nsa_torch_TORCH_ROOT}/include/torch/csrc/api/include")
  target_link_libraries(nsa_torch::torch INTERFACE
    "${nsa_torch_TORCH_ROOT}/lib/libtorch.so" "${nsa_torch_TORCH_ROOT}/lib/libtorch_cpu.so"
    "${nsa_torch_TORCH_ROOT}/lib/libc10.so")
  # What a build with CUDA needs besides: the CUDA half of PyTorch, and the runtime that pip put beside it.
  file(GLOB _nsa_torch_cuda "${nsa_torch_TORCH_ROOT}/lib/libc10_cuda.so" "${nsa_torch_TORCH_ROOT}/lib/libtorch_cuda.so"
       "${nsa_torch_TORCH_ROOT}/../nvidia/*/lib/libcudart.so.*")
  target_link_libraries(nsa_torch::torch INTERFACE ${_nsa_torch_cuda})
  set(_nsa_torch_config "${nsa_torch_TORCH_ROOT}/share/cmake/Torch/TorchConfig.cmake")
  if(EXISTS "${_nsa_torch_config}")
    file(STRINGS "${_nsa_torch_config}" _nsa_torch_abi REGEX "_GLIBCXX_USE_CXX11_ABI=[01]")
    if(_nsa_torch_abi MATCHES "(_GLIBCXX_USE_CXX11_ABI=[01])")
      target_compile_definitions(nsa_torch::torch INTERFACE "${CMAKE_MATCH_1}")
    endif()
  endif()
endmacro()

if(NOT TARGET nsa_torch::torch)
  if(TARGET torch)
    add_library(nsa_torch::torch INTERFACE IMPORTED)
    target_link_libraries(nsa_torch::torch INTERFACE ${TORCH_LIBRARIES})
    set(nsa_torch_TORCH_ROOT "${TORCH_INSTALL_PREFIX}")
  else()
    _nsa_torch_find_torch()
    if(nsa_torch_TORCH_ROOT)
      _nsa_torch_add_torch()
    endif()
  endif()
endif()

# nsa_torch_LIBRARY, or in nsa_torch_HELD the versions of torch that there are libraries for.
macro(_nsa_torch_find_library)
  set(_nsa_torch_folders "${_nsa_torch_installed}/lib" "${_nsa_torch_checkout}/nsa_torch/lib")
  file(STRINGS "${nsa_torch_TORCH_ROOT}/share/cmake/Torch/TorchConfigVersion.cmake" _nsa_torch_version
       REGEX "PACKAGE_VERSION \"[0-9]+\\.[0-9]+")
  if(_nsa_torch_version MATCHES "\"([0-9]+)\\.([0-9]+)")
    set(_nsa_torch_minor "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    find_library(nsa_torch_LIBRARY NAMES "nsa_torch_${CMAKE_MATCH_1}_${CMAKE_MATCH_2}" NO_DEFAULT_PATH NO_CACHE
                 PATHS ${_nsa_torch_folders})
  endif()
  set(nsa_torch_HELD "")
  foreach(_nsa_torch_folder IN LISTS _nsa_torch_folders)
    file(GLOB _nsa_torch_libraries "${_nsa_torch_folder}/libnsa_torch_[0-9]*.so")
    foreach(_nsa_torch_one IN LISTS _nsa_torch_libraries)
      string(REGEX REPLACE "^.*libnsa_torch_([0-9]+)_([0-9]+).so$" "\\1.\\2" _nsa_torch_one "${_nsa_torch_one}")
      list(APPEND nsa_torch_HELD "${_nsa_torch_one}")
    endforeach()
  endforeach()
endmacro()

set(_nsa_torch_reason
    "build the Python package first (pip install .), and name its PyTorch with -Dnsa_torch_TORCH_ROOT=...")
if(nsa_torch_TORCH_ROOT)
  _nsa_torch_find_library()
  if(nsa_torch_HELD AND NOT nsa_torch_LIBRARY)
    list(JOIN nsa_torch_HELD ", " nsa_torch_HELD)
    set(_nsa_torch_reason "nsa_torch was built for torch ${nsa_torch_HELD}, but torch ${_nsa_torch_minor} is in \
${nsa_torch_TORCH_ROOT}: name another with -Dnsa_torch_TORCH_ROOT=..., or build nsa_torch for it (pip install --no-build-isolation .)")
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(nsa_torch
  REQUIRED_VARS nsa_torch_LIBRARY nsa_torch_INCLUDE_DIR nsa_torch_TORCH_ROOT
  REASON_FAILURE_MESSAGE "${_nsa_torch_reason}")

if(nsa_torch_FOUND AND NOT TARGET nsa_torch::nsa_torch)
  add_library(nsa_torch::nsa_torch INTERFACE IMPORTED)
  set_target_properties(nsa_torch::nsa_torch PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${nsa_torch_INCLUDE_DIR}")
  # What differs between versions of torch for a program: which C++ its headers take.
  if(_nsa_torch_minor VERSION_LESS 2.14)
    target_compile_features(nsa_torch::nsa_torch INTERFACE cxx_std_17)
  else()
    target_compile_features(nsa_torch::nsa_torch INTERFACE cxx_std_20)
  endif()
  # A program names no symbol of nsa_torch's library (nsa.h goes through the dispatcher) nor of libtorch.so (which pulls the CUDA
  # half of PyTorch in): a linker that drops libraries nobody names would leave a program without ops.
  if(UNIX AND NOT APPLE)
    target_link_options(nsa_torch::nsa_torch INTERFACE "LINKER:--no-as-needed")
    # The program's search path then holds for the libraries that nsa_torch's needs in turn, which are PyTorch's.
    target_link_options(nsa_torch::nsa_torch INTERFACE "LINKER:--disable-new-dtags")
  endif()
  target_link_libraries(nsa_torch::nsa_torch INTERFACE "${nsa_torch_LIBRARY}" nsa_torch::torch)
endif()
