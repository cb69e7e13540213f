/* The inside of a server: a few threads take requests of many users from a queue. Each user has a session of his own,
 * found by its name, and requests that run at the same time share the model's batches.
 *
 * Build: cc -pthread server.c -o server $(wasi-nn capi --cflags --libs)
 * Run:   printf 'ada My name is Ada.\nbob Hello!\nada What is my name?\n' | ./server model.gguf
 *
 * A line is a user's name and what he says. Answers come as "NAME: TEXT". One user's lines are answered in order.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wasi_nn_llama.h"

enum { N_THREADS = 4, N_LINE_BYTES = 4096, N_ANSWER_BYTES = 16384 };

static void *backend;
static pthread_mutex_t output_lock = PTHREAD_MUTEX_INITIALIZER;

/* A thread's requests. A user belongs to one thread, so his turns stay in order without further locks. */
typedef struct request {
    char line[N_LINE_BYTES];
    struct request *next;
} request;

typedef struct {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    request *first, **end;
    int is_closed;
} queue;

static queue queues[N_THREADS];

static void print_line(const char *user, const char *text, int n_bytes)
{
    pthread_mutex_lock(&output_lock);
    printf("%s: %.*s\n", user, n_bytes, text);
    fflush(stdout);
    pthread_mutex_unlock(&output_lock);
}

static wasi_nn_error answer(const char *user, char *text, uint8_t *out, uint32_t *size)
{
    graph_execution_context session;
    uint32_t n_bytes = (uint32_t)strlen(text);
    tensor_dimensions dimensions = {&n_bytes, 1};
    tensor input = {&dimensions, u8, (uint8_t *)text};
    wasi_nn_error code = init_execution_context_with_session_id(backend, user, &session);
    if (code != success)
        return code;
    return run_inference(backend, session, 0, &input, out, size);
}

static void handle(char *line)
{
    static const char nothing[] = "(no text)";
    uint8_t *out = malloc(N_ANSWER_BYTES);
    uint32_t size = N_ANSWER_BYTES;
    char *text = strchr(line, ' ');
    if (out != NULL && text != NULL) {
        *text++ = 0;
        wasi_nn_error code = answer(line, text, out, &size);
        if (code != success) {
            size = N_ANSWER_BYTES;
            if (wasi_nn_last_error(backend, (char *)out, &size) != success)
                size = 0;
        }
        print_line(line, (char *)out, (int)size);
    } else {
        print_line(line, nothing, (int)sizeof nothing - 1);
    }
    free(out);
}

static void *serve(void *argument)
{
    queue *own = argument;
    for (;;) {
        pthread_mutex_lock(&own->lock);
        while (own->first == NULL && !own->is_closed)
            pthread_cond_wait(&own->arrived, &own->lock);
        request *taken = own->first;
        if (taken != NULL && (own->first = taken->next) == NULL)
            own->end = &own->first;
        pthread_mutex_unlock(&own->lock);
        if (taken == NULL)
            return NULL;
        handle(taken->line);
        free(taken);
    }
}

static queue *queue_of(const char *line)
{
    unsigned hash = 0;
    for (; *line != 0 && *line != ' '; line++)
        hash = hash * 31 + (unsigned char)*line;
    return &queues[hash % N_THREADS];
}

static void read_requests(void)
{
    request *read;
    while ((read = calloc(1, sizeof *read)) != NULL && fgets(read->line, sizeof read->line, stdin) != NULL) {
        read->line[strcspn(read->line, "\n")] = 0;
        queue *target = queue_of(read->line);
        pthread_mutex_lock(&target->lock);
        *target->end = read;
        target->end = &read->next;
        pthread_cond_signal(&target->arrived);
        pthread_mutex_unlock(&target->lock);
    }
    free(read);
}

int main(int argc, char **argv)
{
    static const char config[] = "{\"max_tokens\": 128, \"temperature\": 0, \"max_concurrent\": 4}";
    graph model;
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL < REQUESTS\n", argv[0]);
        return 64;
    }
    wasi_nn_error code = init_backend(&backend);
    if (code == success)
        code = load_by_name_with_config(backend, argv[1], (uint32_t)strlen(argv[1]), config, sizeof config - 1, &model);
    if (code != success) {
        char reason[1024] = "";
        uint32_t size = sizeof reason - 1;
        wasi_nn_last_error(backend, reason, &size);
        fprintf(stderr, "cannot start: error %d: %s\n", (int)code, reason);
        return EXIT_FAILURE;
    }
    for (int i = 0; i < N_THREADS; i++) {
        pthread_mutex_init(&queues[i].lock, NULL);
        pthread_cond_init(&queues[i].arrived, NULL);
        queues[i].end = &queues[i].first;
        pthread_create(&queues[i].thread, NULL, serve, &queues[i]);
    }
    read_requests();
    for (int i = 0; i < N_THREADS; i++) {
        pthread_mutex_lock(&queues[i].lock);
        queues[i].is_closed = 1;
        pthread_cond_signal(&queues[i].arrived);
        pthread_mutex_unlock(&queues[i].lock);
        pthread_join(queues[i].thread, NULL);
    }
    deinit_backend(backend);
    return EXIT_SUCCESS;
}
