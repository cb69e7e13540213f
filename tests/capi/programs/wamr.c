/* WAMR's order of calls with types of its own, as iwasm has them: the library found by its bare name, probe, close, open
 * again, one backend an instance, instances in parallel, their contexts' calls on different threads of 128 KiB, and
 * nothing released but by deinit. All of it twice. Usage: wamr LIBRARY MODEL. Prints each instance's text, one a line. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_INSTANCES = 4, N_STACK_BYTES = 128 << 10, N_TEXT_BYTES = 2048 };

struct dims {
    uint32_t *buf;
    uint32_t size;
};
struct data {
    uint8_t *buf;
    uint32_t size;
};
struct guest_tensor {
    struct dims *dimensions;
    uint8_t type;
    struct data data;
};
_Static_assert(sizeof(struct data) == 16, "tensor data");
_Static_assert(offsetof(struct guest_tensor, type) == 8, "tensor type");
_Static_assert(offsetof(struct guest_tensor, data) == 16, "place of the data");

static int (*init_backend)(void **);
static int (*deinit_backend)(void *);
static int (*load)(void *, void *, int, int, uint32_t *);
static int (*load_by_name)(void *, const char *, uint32_t, uint32_t *);
static int (*load_by_name_with_config)(void *, const char *, uint32_t, const char *, uint32_t, uint32_t *);
static int (*init_execution_context)(void *, uint32_t, uint32_t *);
static int (*set_input)(void *, uint32_t, uint32_t, struct guest_tensor *);
static int (*compute)(void *, uint32_t);
static int (*get_output)(void *, uint32_t, uint32_t, struct data *, uint32_t *);

static const char *model;
static char texts[N_INSTANCES][N_TEXT_BYTES + 1];

static void expect(int expected, int code, const char *what)
{
    if (code != expected) {
        fprintf(stderr, "%s is %d, not %d\n", what, code, expected);
        exit(1);
    }
}

static void look_up(void *library, const char *name, void *place)
{
    void *symbol = dlsym(library, name);
    expect(1, symbol != NULL, name);
    memcpy(place, &symbol, sizeof symbol);
}

/* One module instance. What its calls point to lies in its memory, at odd addresses as guests have them. */
typedef struct {
    char *text;
    void *ctx;
    uint32_t context;
    uint8_t memory[8192];
} module_instance;

enum { PROMPT_AT = 17, DIMENSION_AT = 1001, OUTPUT_AT = 2003, SIZE_AT = 7001 };

/* Runs a part of a guest on a thread of its own, as guests' threads have them. */
static void on_small_stack(void *(*part)(void *), module_instance *own)
{
    pthread_attr_t small;
    pthread_t thread;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, N_STACK_BYTES);
    expect(0, pthread_create(&thread, &small, part, own), "pthread_create");
    pthread_join(thread, NULL);
    pthread_attr_destroy(&small);
}

static void *ask(void *argument)
{
    static const char text[] = "Once upon a time";
    module_instance *own = argument;
    uint32_t dimension = 1;
    struct dims *dims = malloc(sizeof *dims); /* the host's, freed after the call */
    struct guest_tensor input = {dims, 3, {own->memory + PROMPT_AT, sizeof text - 1}};
    memcpy(own->memory + PROMPT_AT, text, sizeof text - 1);
    memcpy(own->memory + DIMENSION_AT, &dimension, sizeof dimension);
    *dims = (struct dims){(uint32_t *)(void *)(own->memory + DIMENSION_AT), 1};
    expect(0, set_input(own->ctx, own->context, 0, &input), "set_input");
    memset(own->memory + PROMPT_AT, 'x', sizeof text);
    free(dims);
    return NULL;
}

static void *answer(void *argument)
{
    module_instance *own = argument;
    expect(0, compute(own->ctx, own->context), "compute");
    return NULL;
}

static void *read_answer(void *argument)
{
    module_instance *own = argument;
    struct data output = {own->memory + OUTPUT_AT, N_TEXT_BYTES};
    uint32_t *size_at = (uint32_t *)(void *)(own->memory + SIZE_AT), size;
    memset(size_at, 0xEE, sizeof size);
    expect(0, get_output(own->ctx, own->context, 0, &output, size_at), "get_output");
    memcpy(&size, size_at, sizeof size);
    expect(1, size > 0 && size <= N_TEXT_BYTES, "a size in range");
    memcpy(own->text, output.buf, size);
    own->text[size] = 0;
    output.size = 1;
    expect(7, get_output(own->ctx, own->context, 0, &output, size_at), "get_output into 1 byte");
    return NULL;
}

static void *run_instance(void *text)
{
    static const char config[] = "{\"stopping\": {\"max_tokens\": 24}, \"sampling\": {\"temperature\": 0}, \"n_ctx\": 256}";
    module_instance *own = calloc(1, sizeof *own);
    char *name = strdup(model), *config_copy = strdup(config); /* valid during the call only */
    uint32_t graph;
    own->text = text;
    expect(0, init_backend(&own->ctx), "init_backend");
    expect(0, load_by_name_with_config(own->ctx, name, (uint32_t)strlen(name), config_copy, sizeof config - 1, &graph),
           "load_by_name_with_config");
    memset(name, 'x', strlen(name));
    memset(config_copy, 'x', strlen(config_copy));
    free(name);
    free(config_copy);
    expect(0, init_execution_context(own->ctx, graph, &own->context), "init_execution_context");
    on_small_stack(ask, own);
    on_small_stack(answer, own);
    on_small_stack(read_answer, own);
    expect(1, compute(own->ctx, 999), "compute on an unknown context");
    expect(1, init_execution_context(own->ctx, 999, &graph), "init_execution_context on an unknown graph");
    expect(0, deinit_backend(own->ctx), "deinit_backend"); /* nothing is closed before */
    free(own);
    return NULL;
}

/* A guest that goes on after a failed init. */
static void run_without_backend(void)
{
    void *ctx = (void *)16;
    uint32_t graph = 0, context = 0, size = 16;
    uint8_t byte = 'x';
    struct guest_tensor input = {NULL, 3, {&byte, 1}};
    setenv("WASI_NN_CONFIG", "/nowhere/config.json", 1);
    expect(1, init_backend(&ctx), "init_backend with a missing configuration file");
    unsetenv("WASI_NN_CONFIG");
    expect(1, ctx == NULL, "no backend");
    expect(1, load_by_name(ctx, model, (uint32_t)strlen(model), &graph), "load_by_name without a backend");
    expect(1, init_execution_context(ctx, graph, &context), "init_execution_context without a backend");
    expect(1, set_input(ctx, 0, 0, &input), "set_input without a backend");
    expect(1, compute(ctx, 0), "compute without a backend");
    expect(1, get_output(ctx, 0, 0, &(struct data){&byte, 1}, &size), "get_output without a backend");
}

/* A runtime from its start to its end: probe, close, open, instances in parallel, close. */
static void run_runtime(const char *path)
{
    pthread_t threads[N_INSTANCES];
    void *library = dlopen(path, RTLD_LAZY);
    if (!library)
        fprintf(stderr, "%s\n", dlerror());
    expect(1, library != NULL, "dlopen");
    dlclose(library);
    library = dlopen(path, RTLD_LAZY);
    look_up(library, "init_backend", &init_backend);
    look_up(library, "deinit_backend", &deinit_backend);
    look_up(library, "load", &load);
    look_up(library, "load_by_name", &load_by_name);
    look_up(library, "load_by_name_with_config", &load_by_name_with_config);
    look_up(library, "init_execution_context", &init_execution_context);
    look_up(library, "set_input", &set_input);
    look_up(library, "compute", &compute);
    look_up(library, "get_output", &get_output);
    run_without_backend();
    for (int i = 0; i < N_INSTANCES; i++)
        expect(0, pthread_create(&threads[i], NULL, run_instance, texts[i]), "pthread_create");
    for (int i = 0; i < N_INSTANCES; i++)
        pthread_join(threads[i], NULL);
    dlclose(library);
    for (int i = 0; i < N_INSTANCES; i++)
        puts(texts[i]);
}

int main(int argc, char **argv)
{
    expect(3, argc, "the number of arguments");
    model = argv[2];
    run_runtime(argv[1]);
    run_runtime(argv[1]);
    return 0;
}
