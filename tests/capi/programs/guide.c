/* A server's life with the library: a backend, a model under a configuration file with every section, many users at once,
 * limits, a full window, computations that are stopped, and every failure that an operator meets. Ends at the first thing
 * that is not as it should be. Usage: guide MODEL CONFIG_FILE. Prints what the users got, a line each: USER TURN BYTES. */
#include <pthread.h>
#include <time.h>

#include "check.h"

enum { N_USERS = 12, N_TURNS = 3, N_ANSWER_BYTES = 4096 };

typedef struct {
    graph_execution_context context;
    char id[64];
    time_t last_used;
    uint32_t n_bytes[N_TURNS];
} user_session;

static void *backend;
static const char *model;
static graph g;
static user_session sessions[N_USERS];
static int n_sessions;
static pthread_mutex_t session_lock = PTHREAD_MUTEX_INITIALIZER;

static graph load_with(const char *config)
{
    graph loaded;
    CHECK_CODE(success, load_by_name_with_config(backend, model, (uint32_t)strlen(model), config, (uint32_t)strlen(config),
                                                 &loaded));
    return loaded;
}

static graph_execution_context context_on(graph on)
{
    graph_execution_context context;
    CHECK_CODE(success, init_execution_context(backend, on, &context));
    return context;
}

static wasi_nn_error set_text(graph_execution_context context, uint32_t index, const char *text)
{
    uint32_t n_bytes = (uint32_t)strlen(text);
    tensor_dimensions dimensions = {&n_bytes, 1};
    tensor input = {&dimensions, u8, (uint8_t *)text};
    return set_input(backend, context, index, &input);
}

/* The code of compute; the output's size in any case. */
static wasi_nn_error ask(graph_execution_context context, const char *prompt, char *answer, uint32_t *size)
{
    CHECK_CODE(success, set_text(context, 0, prompt));
    wasi_nn_error code = compute(backend, context);
    *size = N_ANSWER_BYTES;
    CHECK_CODE(success, get_output(backend, context, 0, (uint8_t *)answer, size));
    return code;
}

static int create_session(int user)
{
    pthread_mutex_lock(&session_lock);
    int index = n_sessions++;
    user_session *created = &sessions[index];
    snprintf(created->id, sizeof created->id, "user-%d", user);
    created->context = context_on(g);
    created->last_used = time(NULL);
    pthread_mutex_unlock(&session_lock);
    return index;
}

static void *serve_user(void *user)
{
    user_session *own = &sessions[create_session((int)(intptr_t)user)];
    char prompt[128], answer[N_ANSWER_BYTES];
    for (int turn = 0; turn < N_TURNS; turn++) {
        snprintf(prompt, sizeof prompt, "I am %s, and this is turn %d. Tell me a story.", own->id, turn);
        CHECK_CODE(success, ask(own->context, prompt, answer, &own->n_bytes[turn]));
        own->last_used = time(NULL);
    }
    return NULL;
}

static void serve_users(void)
{
    pthread_t threads[N_USERS];
    for (intptr_t user = 0; user < N_USERS; user++)
        CHECK(pthread_create(&threads[user], NULL, serve_user, (void *)user) == 0);
    for (int user = 0; user < N_USERS; user++)
        pthread_join(threads[user], NULL);
    for (int i = 0; i < n_sessions; i++)
        for (int turn = 0; turn < N_TURNS; turn++)
            printf("%s %d %u\n", sessions[i].id, turn, sessions[i].n_bytes[turn]);
}

/* What the guide does with an array of its own; here all of them are too old. */
static void clean_up_sessions(void)
{
    while (n_sessions > 0) {
        user_session *oldest = &sessions[--n_sessions];
        CHECK(time(NULL) - oldest->last_used >= 0);
        CHECK_CODE(success, close_execution_context(backend, oldest->context));
        CHECK_CODE(invalid_argument, compute(backend, oldest->context));
    }
}

static void limit_sessions(void)
{
    char answer[N_ANSWER_BYTES];
    uint32_t size;
    graph_execution_context first, again, refused = 77;
    graph few = load_with("{\"backend\": {\"max_sessions\": 1}, \"model\": {\"n_ctx\": 256}, \"max_tokens\": 4}");
    CHECK_CODE(success, init_execution_context_with_session_id(backend, "ada", &first)); /* on the newest graph */
    CHECK_CODE(success, init_execution_context_with_session_id(backend, "ada", &again));
    CHECK(again == first);
    CHECK_CODE(success, ask(first, "hello", answer, &size));
    graph_execution_context other = context_on(few); /* takes its place */
    CHECK_CODE(invalid_argument, set_text(first, 0, "still there?"));
    CHECK(strstr(last_error(), "max_sessions"));
    CHECK_CODE(success, get_output(backend, first, 1, (uint8_t *)answer, &(uint32_t){sizeof answer}));
    CHECK_CODE(success, init_execution_context_with_session_id(backend, "ada", &again)); /* and takes it back */
    CHECK(again != first && again != other);
    CHECK_CODE(success, ask(again, "hello again", answer, &size));
    CHECK_CODE(invalid_argument, compute(backend, other));
    CHECK_CODE(success, close_execution_context(backend, first)); /* once for each of its two openings */
    CHECK_CODE(success, close_execution_context(backend, first));
    CHECK_CODE(invalid_argument, close_execution_context(backend, first));
    CHECK_CODE(success, close_execution_context(backend, again));

    graph strict = load_with("{\"backend\": {\"max_sessions\": 1, \"auto_cleanup\": false}, \"model\": {\"n_ctx\": 256}}");
    graph_execution_context only = context_on(strict);
    CHECK_CODE(timeout, init_execution_context(backend, strict, &refused));
    CHECK(refused == 77);
    CHECK_CODE(success, close_execution_context(backend, only));
    CHECK_CODE(success, unload(backend, strict));
    CHECK_CODE(success, unload(backend, few));
}

static void limit_time(void)
{
    char answer[N_ANSWER_BYTES];
    uint32_t size;
    graph slow = load_with("{\"backend\": {\"default_task_timeout_ms\": 1}, \"stopping\": {\"max_tokens\": 250},"
                           " \"model\": {\"n_ctx\": 512}, \"sampling\": {\"ignore_eos\": true}}");
    graph_execution_context context = context_on(slow);
    CHECK_CODE(timeout, ask(context, "A long story, please.", answer, &size));
    CHECK_CODE(success, set_text(context, 1, "{\"task\": {\"priority\": \"high\", \"timeout_ms\": 0}, \"max_tokens\": 3}"));
    CHECK_CODE(success, ask(context, "A short one, then.", answer, &size));
    CHECK_CODE(success, unload(backend, slow));
}

static void fill_windows(void)
{
    static char prompt[2000];
    char answer[N_ANSWER_BYTES];
    uint32_t size, n_shifted = 0;
    memset(prompt, 'x', sizeof prompt - 1);
    graph fixed = load_with("{\"model\": {\"n_ctx\": 256}, \"memory\": {\"context_shifting\": false}, \"session\":"
                            " {\"prompt_mode\": \"raw\"}, \"stopping\": {\"max_tokens\": 400}, \"ignore_eos\": true}");
    graph_execution_context context = context_on(fixed);
    CHECK_CODE(context_full, ask(context, "Once upon a time", answer, &size));
    CHECK(size > 0); /* the text so far */
    CHECK_CODE(success, set_text(context, 0, prompt));
    CHECK_CODE(prompt_too_long, compute(backend, context));
    CHECK_CODE(success, unload(backend, fixed));

    graph shifting = load_with("{\"model\": {\"n_ctx\": 256}, \"memory\": {\"context_shifting\": true, \"n_keep_tokens\": 8,"
                               " \"n_discard_tokens\": 64}, \"session\": {\"prompt_mode\": \"raw\"}, \"stopping\":"
                               " {\"max_tokens\": 400}, \"ignore_eos\": true}");
    context = context_on(shifting);
    CHECK_CODE(success, ask(context, "Once upon a time", answer, &size));
    size = sizeof answer;
    CHECK_CODE(success, get_output(backend, context, 1, (uint8_t *)answer, &size));
    const char *shifted = strstr(answer, "\"shifted_tokens\": ");
    CHECK(shifted && sscanf(shifted, "\"shifted_tokens\": %u", &n_shifted) == 1);
    CHECK(n_shifted >= 64 && n_shifted % 64 == 0);
    CHECK_CODE(success, unload(backend, shifting));
}

typedef struct {
    void *backend;
    graph_execution_context context;
    _Atomic(int) code; /* of the compute that did not succeed; -1 before */
} computation;

static void *compute_until_stopped(void *argument)
{
    computation *own = argument;
    int code;
    do {
        code = (int)compute(own->backend, own->context);
    } while (code == success || code == timeout); /* timeout: the context is in another call */
    own->code = code;
    return NULL;
}

/* What runs is stopped from another thread: by cancel, and by the end of its backend. */
static void stop_computations(void)
{
    static const char config[] = "{\"model\": {\"n_ctx\": 4096}, \"max_tokens\": 4000, \"ignore_eos\": true}";
    void *shared = backend;
    for (int ends_backend = 0; ends_backend < 2; ends_backend++) {
        pthread_t thread;
        char answer[1 << 16];
        uint32_t size = sizeof answer;
        computation one = {.code = -1};
        CHECK_CODE(success, init_backend(&backend));
        one.backend = backend;
        one.context = context_on(load_with(config));
        CHECK_CODE(success, set_text(one.context, 0, "Once upon a time"));
        CHECK(pthread_create(&thread, NULL, compute_until_stopped, &one) == 0);
        while (set_text(one.context, 0, "Once more") == success) /* until the computation has begun */
            continue;
        CHECK(strstr(last_error(), "working on another call"));
        if (ends_backend)
            CHECK_CODE(success, deinit_backend(backend));
        while (one.code == -1 && !ends_backend)
            CHECK_CODE(success, cancel(backend, one.context));
        pthread_join(thread, NULL);
        CHECK(one.code == runtime_error || (ends_backend && one.code == invalid_argument)); /* it came a moment later */
        if (!ends_backend) {
            CHECK_CODE(success, get_output(backend, one.context, 0, (uint8_t *)answer, &size)); /* the text so far */
            CHECK_CODE(success, deinit_backend(backend));
        }
    }
    backend = shared;
}

static void fail_to_load(void)
{
    static const struct {
        wasi_nn_error code;
        const char *name, *config, *words;
    } cases[] = {
        {model_not_found, "/nowhere/model.gguf", "{}", "/nowhere/model.gguf"},
        {invalid_argument, "/etc/passwd", "{}", "GGUF"},
        {invalid_argument, "/etc", "{}", "/etc"},
        {invalid_encoding, NULL, "{\"model\": ", "JSON"},
        {invalid_encoding, NULL, "not JSON", "JSON"},
        {invalid_argument, NULL, "{\"model\": {\"n_ctx\": -5}}", "n_ctx"},
        {invalid_argument, NULL, "{\"sampling\": {\"temperature\": \"hot\"}}", "temperature"},
        {invalid_argument, NULL, "{\"memory\": {\"max_memory_mb\": []}}", "max_memory_mb"},
        {invalid_argument, NULL, "[1, 2]", ""},
    };
    graph refused = 77;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *name = cases[i].name ? cases[i].name : model, *config = cases[i].config;
        int code = (int)load_by_name_with_config(backend, name, (uint32_t)strlen(name), config, (uint32_t)strlen(config),
                                                 &refused);
        if (code != (int)cases[i].code || !strstr(last_error(), cases[i].words))
            fprintf(stderr, "case %zu: %d: %s\n", i, code, last_error());
        CHECK(code == (int)cases[i].code && strstr(last_error(), cases[i].words));
    }
    CHECK(refused == 77);
}

static char *read_file(const char *path, uint32_t *size)
{
    static char text[1 << 16];
    FILE *opened = fopen(path, "rb");
    CHECK(opened);
    *size = (uint32_t)fread(text, 1, sizeof text, opened);
    fclose(opened);
    return text;
}

int main(int argc, char **argv)
{
    uint32_t n_config_bytes;
    CHECK(argc == 3);
    model = argv[1];
    char *config = read_file(argv[2], &n_config_bytes);
    CHECK_CODE(success, init_backend(&backend));
    CHECK_CODE(success, load_by_name_with_config(backend, model, (uint32_t)strlen(model), config, n_config_bytes, &g));
    serve_users();
    clean_up_sessions();
    limit_sessions();
    limit_time();
    fill_windows();
    stop_computations();
    fail_to_load();
    CHECK_CODE(success, deinit_backend(backend));
    CHECK_CODE(invalid_argument, compute(backend, 1));
    return 0;
}
