// twophase_ext._C: build information, and the library of operators by being linked to it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &twophase::build_info);
  m.def("sources", &twophase::sources);
  m.def("set_isa", &twophase::set_isa_by_name);
}
