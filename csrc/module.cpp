// `import fastrl._C` loads this library, and loading it registers the ops; the module itself is empty.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Native ops of fastrl, under torch.ops.fastrl.", -1};
  return PyModule_Create(&definition);
}
