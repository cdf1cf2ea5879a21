// A team of threads. It takes the pieces of its jobs in turn, of one job after the other without a gap, and sleeps while
// there is none: threads that spin would hold up the one that feeds a GPU.

#include "host_team.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

// Has so many threads, the caller's one of them, run a function: GOMP_parallel of OpenMP runtimes, since GCC 4.9.
typedef void run_parallel(void (*function)(void *), void *argument, unsigned num_threads, unsigned flags);

struct job {
    run_piece *run;
    const void *work;       // it stays until the job is waited for
    int64_t num_pieces;
    atomic_llong next;      // piece
    int num_busy, is_over;  // threads that are at it; whether all is done
    double seconds;         // from its first piece, or the end of the job before, to its end
    struct job *after;
};

struct team {
    run_parallel *lent;     // NULL: the team has threads of its own
    int num_threads;
    pthread_mutex_t lock;
    pthread_cond_t begun, ended;
    pthread_t *threads;
    int num_own, num_jobs, is_dismissed;
    double ended_s;         // when a job ended last
    struct job *first, *last;  // those of which pieces are left
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void take_pieces(void *argument) {
    struct job *const job = argument;
    for (int64_t piece; (piece = atomic_fetch_add(&job->next, 1)) < job->num_pieces;) job->run(job->work, piece);
}

static void *serve(void *argument) {
    struct team *const team = argument;
    pthread_mutex_lock(&team->lock);
    for (;;) {
        while (!team->first && !team->is_dismissed) pthread_cond_wait(&team->begun, &team->lock);
        struct job *const job = team->first;
        if (!job) break;
        if (!job->num_busy++) job->seconds = -now();  // nobody joins once a thread has found no piece left
        pthread_mutex_unlock(&team->lock);
        take_pieces(job);
        pthread_mutex_lock(&team->lock);
        if (team->first == job) team->first = job->after;
        if (--job->num_busy) continue;
        const double end = now(), begin = -job->seconds;
        job->seconds = end - (begin > team->ended_s ? begin : team->ended_s);
        job->is_over = 1, team->ended_s = end, team->num_jobs--;
        pthread_cond_broadcast(&team->ended);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

// Ends a team once its jobs are done: its threads are gone.
void flexeval_dismiss(struct team *team) {
    pthread_mutex_lock(&team->lock);
    team->is_dismissed = 1;
    pthread_cond_broadcast(&team->begun);
    pthread_mutex_unlock(&team->lock);
    for (int thread = 0; thread < team->num_own; thread++) pthread_join(team->threads[thread], NULL);
    pthread_mutex_destroy(&team->lock), pthread_cond_destroy(&team->begun), pthread_cond_destroy(&team->ended);
    free(team->threads), free(team);
}

// As many threads as asked for, or as many as can be had; NULL without memory. Those that are lent come with each job,
// the caller's one of them.
struct team *flexeval_gather(int num_threads, run_parallel *lent) {
    struct team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->num_threads = num_threads, team->lent = lent;
    if (!(team->threads = calloc(num_threads, sizeof *team->threads))) return free(team), NULL;
    pthread_mutex_init(&team->lock, NULL), pthread_cond_init(&team->begun, NULL), pthread_cond_init(&team->ended, NULL);
    while (!lent && team->num_own < num_threads && !pthread_create(&team->threads[team->num_own], NULL, serve, team))
        team->num_own++;
    return team;
}

struct job *flexeval_begin(struct team *team, run_piece *run, const void *work, int64_t num_pieces) {
    struct job *const job = calloc(1, sizeof *job);
    if (!job) return NULL;
    job->run = run, job->work = work, job->num_pieces = num_pieces;
    if (team->lent || !team->num_own) {
        const double begin = now();
        team->lent && num_pieces > 1 ? team->lent(take_pieces, job, team->num_threads, 0) : take_pieces(job);
        job->seconds = now() - begin, job->is_over = 1;
        return job;
    }
    pthread_mutex_lock(&team->lock);
    if (team->first) team->last->after = job;
    else team->first = job;
    team->last = job, team->num_jobs++;
    pthread_cond_broadcast(&team->begun);
    pthread_mutex_unlock(&team->lock);
    return job;
}

// Seconds that a job took the team, once it is done. It is gone then.
double flexeval_wait(struct team *team, struct job *job) {
    pthread_mutex_lock(&team->lock);
    while (!job->is_over) pthread_cond_wait(&team->ended, &team->lock);
    pthread_mutex_unlock(&team->lock);
    const double seconds = job->seconds;
    free(job);
    return seconds;
}

// Returns when all jobs are done, waited for or not.
void flexeval_drain(struct team *team) {
    pthread_mutex_lock(&team->lock);
    while (team->num_jobs) pthread_cond_wait(&team->ended, &team->lock);
    pthread_mutex_unlock(&team->lock);
}
