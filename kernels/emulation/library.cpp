// The launchers as a library for the CPU, same names and arguments, on pointers to host memory; streams are ignored.
//   c++ -O3 -std=c++17 -DDK_EMU -shared -fPIC library.cpp -o library.so
#include "../csrc/short_attention.cu"

#ifndef DK_EMU
#error "compile with -DDK_EMU"
#endif

// Chooses the order of the fibers, and by its last bit which of two behaviours that hardware may show they see.
extern "C" void dk_emulation_seed(unsigned seed) { dk::emulation::machine.seed = seed; }
