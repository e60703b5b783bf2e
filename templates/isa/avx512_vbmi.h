// The vocabulary of AVX-512 VBMI, over that of AVX-512 VNNI: bytes are picked from two registers at once.
