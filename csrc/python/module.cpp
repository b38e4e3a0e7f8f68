// vosops._C: what was built, and with what. No tensors pass through here; every op works without this module.
#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of vosops.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["summary"] = VOSOPS_BUILD_SUMMARY;
    info["compiler"] = compiler();
    info["torch"] = VOSOPS_BUILD_TORCH;
    info["cuda_architectures"] = VOSOPS_CUDA_ARCHITECTURES;
    return info;
  });
}
