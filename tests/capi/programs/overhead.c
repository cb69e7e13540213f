/* What a call costs beside its work: microseconds of get_output, of a compute that is refused, and of a refusal in C.
 * Usage: overhead MODEL. Prints one JSON object. */
#define _GNU_SOURCE
#include <time.h>

#include "check.h"

enum { N_CALLS = 3000 };

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const char *name, double *us, const char *separator)
{
    qsort(us, N_CALLS, sizeof *us, compare);
    printf("\"%s_median_us\": %.2f, \"%s_p99_us\": %.2f%s", name, us[N_CALLS / 2], name, us[N_CALLS * 99 / 100], separator);
}

int main(int argc, char **argv)
{
    static double us[N_CALLS];
    void *backend = NULL;
    graph model;
    graph_execution_context context;
    CHECK(argc == 2);
    CHECK_CODE(success, init_backend(&backend));
    CHECK_CODE(success, load_by_name_with_config(backend, argv[1], (uint32_t)strlen(argv[1]), "{\"max_tokens\": 4}", 17, &model));
    CHECK_CODE(success, init_execution_context(backend, model, &context));
    uint8_t text[4096], prompt[] = "hello";
    uint32_t size = sizeof text;
    tensor input = {NULL, u8, prompt};
    CHECK_CODE(success, run_inference(backend, context, 0, &input, text, &size));
    printf("{");
    for (int i = 0; i < N_CALLS; i++) {
        size = sizeof text;
        double start = now_us();
        CHECK_CODE(success, get_output(backend, context, 0, text, &size));
        us[i] = now_us() - start;
    }
    report("get_output", us, ", ");
    for (int i = 0; i < N_CALLS; i++) {
        double start = now_us();
        CHECK_CODE(invalid_argument, compute(backend, 12345));
        us[i] = now_us() - start;
    }
    report("compute_refused", us, ", ");
    for (int i = 0; i < N_CALLS; i++) {
        double start = now_us();
        CHECK_CODE(invalid_argument, compute(NULL, 1));
        us[i] = now_us() - start;
    }
    report("compute_null", us, "}\n");
    CHECK_CODE(success, deinit_backend(backend));
    return 0;
}
