/* The C side of bench/capi.py: does what its standard input says, one command a line.
 *
 *   round NAME       opens sessions of its own, makes all calls, and prints one line a call, "SESSION TURN TEXT METADATA"
 *                    with the text in hex, and then "seconds X": the time of the calls
 *   overhead N       N calls of each kind; prints one JSON object with the medians and 99th percentiles in microseconds
 *
 * A session's calls are made by one thread, in order. Usage: capi MODEL CONFIG N_THREADS N_SESSIONS N_CALLS
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "wasi_nn_llama.h"

enum { N_MAX = 1024, N_TEXT_BYTES = 8192 };

static void *backend;
static graph model;
static int n_threads, n_sessions, n_calls;
static graph_execution_context sessions[N_MAX];
static char texts[N_MAX][N_TEXT_BYTES], metadata[N_MAX][N_TEXT_BYTES];

static void check(wasi_nn_error expected, wasi_nn_error code, const char *what)
{
    char reason[1024];
    uint32_t size = sizeof reason;
    if (code == expected)
        return;
    if (wasi_nn_last_error(backend, reason, &size) != success)
        size = 0;
    fprintf(stderr, "%s is %d, not %d: %.*s\n", what, (int)code, (int)expected, (int)size, reason);
    exit(EXIT_FAILURE);
}

#define CHECK(expected, call) check(expected, call, #call)

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void ask(graph_execution_context session, char *prompt, char *text)
{
    uint32_t n_prompt_bytes = (uint32_t)strlen(prompt), size = N_TEXT_BYTES;
    tensor_dimensions dimensions = {&n_prompt_bytes, 1};
    tensor input = {&dimensions, u8, (uint8_t *)prompt};
    CHECK(success, set_input(backend, session, 0, &input));
    CHECK(success, compute(backend, session));
    CHECK(success, get_output(backend, session, 0, (uint8_t *)text, &size));
}

static void *serve(void *first)
{
    for (int call = 0; call < n_calls; call++) {
        int session = call % n_sessions;
        char prompt[64];
        uint32_t size = N_TEXT_BYTES;
        if (session % n_threads != (int)(intptr_t)first)
            continue;
        snprintf(prompt, sizeof prompt, "Session %d, turn %d: tell me something.", session, call / n_sessions);
        ask(sessions[session], prompt, texts[call]);
        CHECK(success, get_output(backend, sessions[session], 1, (uint8_t *)metadata[call], &size));
    }
    return NULL;
}

static void run_round(const char *name)
{
    pthread_t threads[N_MAX];
    for (int i = 0; i < n_sessions; i++) {
        char id[96];
        snprintf(id, sizeof id, "%.64s, session %d", name, i);
        CHECK(success, init_execution_context_with_session_id(backend, id, &sessions[i]));
    }
    double start_us = now_us();
    for (intptr_t i = 0; i < n_threads; i++)
        if (pthread_create(&threads[i], NULL, serve, (void *)i) != 0)
            exit(EXIT_FAILURE);
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    double seconds = (now_us() - start_us) / 1e6;
    for (int call = 0; call < n_calls; call++) {
        printf("%d %d ", call % n_sessions, call / n_sessions);
        for (const char *c = texts[call]; *c; c++)
            printf("%02x", (unsigned char)*c);
        printf(" %s\n", metadata[call]);
    }
    printf("seconds %.6f\n", seconds);
    for (int i = 0; i < n_sessions; i++)
        CHECK(success, close_execution_context(backend, sessions[i]));
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, double *us, int n, const char *end)
{
    qsort(us, (size_t)n, sizeof *us, compare);
    printf("\"%s\": {\"median_us\": %.2f, \"p99_us\": %.2f}%s", name, us[n / 2], us[n * 99 / 100], end);
}

/* `empty_compute` is of a context that has no prompt, `null_compute` is refused before Python. */
static void measure_overhead(int n)
{
    double *us = calloc((size_t)n, sizeof *us);
    char prompt[] = "hello";
    graph_execution_context asked, empty;
    if (us == NULL || n < 1)
        exit(EXIT_FAILURE);
    CHECK(success, init_execution_context(backend, model, &asked));
    CHECK(success, init_execution_context(backend, model, &empty));
    ask(asked, prompt, texts[0]);
    for (int i = 0; i < n; i++) {
        uint32_t size = N_TEXT_BYTES;
        double start = now_us();
        CHECK(success, get_output(backend, asked, 0, (uint8_t *)texts[0], &size));
        us[i] = now_us() - start;
    }
    printf("{");
    print_times("get_output", us, n, ", ");
    for (int i = 0; i < n; i++) {
        double start = now_us();
        CHECK(invalid_argument, compute(backend, empty));
        us[i] = now_us() - start;
    }
    print_times("empty_compute", us, n, ", ");
    for (int i = 0; i < n; i++) {
        double start = now_us();
        CHECK(invalid_argument, compute(NULL, empty));
        us[i] = now_us() - start;
    }
    print_times("null_compute", us, n, "}\n");
    CHECK(success, close_execution_context(backend, asked));
    CHECK(success, close_execution_context(backend, empty));
    free(us);
}

static int read_count(const char *text)
{
    int n = atoi(text);
    if (n < 1 || n > N_MAX) {
        fprintf(stderr, "%s is no number from 1 to %d\n", text, N_MAX);
        exit(EXIT_FAILURE);
    }
    return n;
}

int main(int argc, char **argv)
{
    char line[256];
    if (argc != 6) {
        fprintf(stderr, "usage: %s MODEL CONFIG N_THREADS N_SESSIONS N_CALLS\n", argv[0]);
        return EXIT_FAILURE;
    }
    n_threads = read_count(argv[3]);
    n_sessions = read_count(argv[4]);
    n_calls = read_count(argv[5]);
    CHECK(success, init_backend(&backend));
    CHECK(success, load_by_name_with_config(backend, argv[1], (uint32_t)strlen(argv[1]), argv[2],
                                            (uint32_t)strlen(argv[2]), &model));
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "round ", 6) == 0)
            run_round(line + 6);
        else if (strncmp(line, "overhead ", 9) == 0)
            measure_overhead(atoi(line + 9));
        fflush(stdout);
    }
    CHECK(success, deinit_backend(backend));
    return 0;
}
