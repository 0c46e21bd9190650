// NEON with the dot-product extension (ARMv8.2 and later): one instruction for the four bytes of a lane.
#include "layout.h"

#if defined(LAYERWISE_NEON)
#define LAYERWISE_DOT
#include "neon.h"

namespace layerwise {
const Path kNeonDot = {"neon-dot", multiply, decode, read_lines, dots, side_by_side, sparse, quantize};
}
#endif
