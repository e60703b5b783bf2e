// The vocabulary of AMX-INT8 is that of AVX-512 VBMI and the words for tiles (tiles/amx_int8.h).
