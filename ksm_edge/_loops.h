/* What all operators compute, as the processor of whoever includes this has registers for it, in one table. */

#ifndef KSM_EDGE_LOOPS_H
#define KSM_EDGE_LOOPS_H

#include "_depthwise.h"
#include "_products.h"
#include "_wider.h"
#include "_windows.h"
#include "_winograd.h"

typedef struct {
    Run *forward, *backward, *gate, *transform, *contract, *windows, *pool_gradient;
    int (*widened_forward)(const Forward *f);
    int (*widened_backward)(const Backward *b);
    Multiply *multiply;
} Loops;

#define ALL_LOOPS                                                                                                      \
    {                                                                                                                  \
        forward, backward, gate, transform, contract, windows, pool_gradient, widened_forward, widened_backward,       \
            multiply                                                                                                   \
    }

#ifdef WIDER_LOOPS
extern const Loops ksm_edge_avx2 __attribute__((visibility("hidden")));
extern const Loops ksm_edge_avx512 __attribute__((visibility("hidden")));
#endif

#endif
