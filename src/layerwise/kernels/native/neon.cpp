// NEON as every 64-bit ARM has it: four bytes of a lane are multiplied in 16 bits and added up in two steps.
#include "layout.h"

#if defined(LAYERWISE_NEON)
#include "neon.h"

namespace layerwise {
const Path kNeon = {"neon", multiply, decode, read_lines, dots, side_by_side, sparse, quantize};
}
#endif
