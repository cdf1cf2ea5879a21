// A team of threads that does jobs, each of many pieces; see host_team.c.

#pragma once
#include <stdint.h>

struct team;
struct job;

// One piece of some work.
typedef void run_piece(const void *work, int64_t piece);

// A job for the team, to be waited for, behind those it has; NULL without memory. Threads that are lent have done it.
struct job *flexeval_begin(struct team *team, run_piece *run, const void *work, int64_t num_pieces);
