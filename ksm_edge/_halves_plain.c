/* Products in half precision for any processor, which float32 is faster on. */

#include "_wider.h"

#if defined(__aarch64__) || defined(__ARM_NEON)
enum { LANES = 8, TILE = 4, ROWS = 4, REGISTERS = 2 };
#else
enum { LANES = 4, TILE = 4, ROWS = 4, REGISTERS = 2 };
#endif
#define HALVES

#include "_products.h"

void ksm_edge_half_product_plain(Multiplication m)
{
    multiply(m);
}
