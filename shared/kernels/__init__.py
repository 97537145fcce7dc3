"""Our kernels in C++: the experts, and the dense part of a layer."""
