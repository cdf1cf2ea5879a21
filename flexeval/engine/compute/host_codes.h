// Decode attention over codes, in products of bytes; see host_codes.c.

#pragma once
#include "host_decode.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define HAS_BYTE_PRODUCTS 1

// Attends over one part of a context for some KV heads with one query each.
void attend_to_codes(const struct work *w, int64_t part, int64_t first_head, int64_t last_head);
#else
#define HAS_BYTE_PRODUCTS 0
#endif
