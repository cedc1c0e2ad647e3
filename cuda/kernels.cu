/* Every kernel of fox.c in one object: each header defines its launchers (cuda/launchers.h) once, here. */
#include "adamw.cuh"
#include "cross_entropy.cuh"
#include "embedding.cuh"
#include "norm.cuh"
#include "output_gate.cuh"
#include "qkv.cuh"
#include "swiglu.cuh"
