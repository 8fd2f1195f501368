from testing.compiled import ROOT, build, load  # noqa: F401 - until tests/native/kernels names the new place
