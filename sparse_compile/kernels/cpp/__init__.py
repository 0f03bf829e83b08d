"""What all C++ kernels share: their library, the instructions it is built for, and its builder."""
