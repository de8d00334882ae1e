// What a <op>_cpu.cpp includes first, before its formula: the formula's templates look up the vector functions where they
// are defined, not where they are used.
#pragma once
#include "simd.h"

#include "parallel.h"
