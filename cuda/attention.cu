/* The launchers of attention; a file of its own, because its kernels take longest to compile. */
#include "../acp_attention.cuh"
