/* Threads that share sessions: each session's prompts in turn, all sessions at once. The text of each call goes to
 * standard output as "SESSION TURN BYTES_IN_HEX", and "seconds X" at the end: the time of the calls alone.
 * Usage: sessions MODEL CONFIG N_THREADS N_SESSIONS N_CALLS. */
#define _GNU_SOURCE
#include <pthread.h>
#include <time.h>

#include "check.h"

enum { N_MAX = 1024, N_TEXT_BYTES = 8192 };

static void *backend;
static int n_threads, n_sessions, n_calls;
static graph_execution_context contexts[N_MAX];
static char *texts[N_MAX];
static uint32_t sizes[N_MAX];

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Calls of one session are made by one thread, in order. */
static void *serve(void *first)
{
    for (int call = 0; call < n_calls; call++) {
        int session = call % n_sessions;
        if (session % n_threads != (int)(intptr_t)first)
            continue;
        char prompt[64];
        snprintf(prompt, sizeof prompt, "Session %d, turn %d: tell me something.", session, call / n_sessions);
        tensor input = {NULL, u8, (uint8_t *)prompt};
        CHECK(texts[call] = malloc(N_TEXT_BYTES));
        sizes[call] = N_TEXT_BYTES;
        CHECK_CODE(success, set_input(backend, contexts[session], 0, &input));
        CHECK_CODE(success, compute(backend, contexts[session]));
        CHECK_CODE(success, get_output(backend, contexts[session], 0, (uint8_t *)texts[call], &sizes[call]));
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[N_MAX];
    graph model;
    CHECK(argc == 6);
    n_threads = atoi(argv[3]);
    n_sessions = atoi(argv[4]);
    n_calls = atoi(argv[5]);
    CHECK(n_calls <= N_MAX && n_sessions <= N_MAX && n_threads <= N_MAX);
    CHECK_CODE(success, init_backend(&backend));
    CHECK_CODE(success, load_by_name_with_config(backend, argv[1], (uint32_t)strlen(argv[1]), argv[2],
                                                 (uint32_t)strlen(argv[2]), &model));
    for (int i = 0; i < n_sessions; i++) {
        char id[32];
        snprintf(id, sizeof id, "session-%d", i);
        CHECK_CODE(success, init_execution_context_with_session_id(backend, id, &contexts[i]));
    }
    double start = now_s();
    for (intptr_t i = 0; i < n_threads; i++)
        CHECK(pthread_create(&threads[i], NULL, serve, (void *)i) == 0);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    double seconds = now_s() - start;
    for (int call = 0; call < n_calls; call++) {
        printf("%d %d ", call % n_sessions, call / n_sessions);
        for (uint32_t i = 0; i < sizes[call]; i++)
            printf("%02x", (unsigned char)texts[call][i]);
        printf("\n");
        free(texts[call]);
    }
    printf("seconds %.6f\n", seconds);
    CHECK_CODE(success, deinit_backend(backend));
    return 0;
}
