/* Where the compiler can make loops for wider registers than every processor of the kind has, and tell which one it is
   that they run on, WIDER_LOOPS is defined. */

#ifndef KSM_EDGE_WIDER_H
#define KSM_EDGE_WIDER_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDER_LOOPS
#if __GNUC__ >= 11 /* that know of bfloat16 */
#define PAIRED_HALVES
#endif
#endif

#endif
