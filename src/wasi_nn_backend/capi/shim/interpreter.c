/* Starts Python in a foreign process, or joins the one that is there.
 *
 * Python starts isolated (no PYTHON* variables, no user site) and leaves the process as it is: no signal handlers, no
 * setlocale, no buffering of the C streams. cffi's own start-up would call Py_InitializeEx, which sets the locale and
 * knows nothing of virtual environments, so Python has to run before that. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "calls.h"
#include "environment.h" /* written by capi/build.py */

enum { N_PATH_BYTES = 4096 };

/* Where Python and the package are. `root` is set where the package is not installed in the environment. */
typedef struct {
    char executable[N_PATH_BYTES];
    char site_packages[N_PATH_BYTES];
    const char *root;
} environment;

/* Taken out of cffi's book: one lock for all libraries of a process has to lie in something that they share, and that is
 * libpython. cffi's start-up code takes this same one around Py_InitializeEx. */
#if PY_VERSION_HEX < 0x030C0000
typedef unsigned int lock_word;
#define LOCK_WORD ((volatile lock_word *)&PyCapsule_Type.tp_version_tag)
#define LOCKED ((lock_word)-42)
#else
static struct {
    PyBufferProcs procs;
    int mark;
} empty_buffer_procs = {.mark = -42};
typedef PyBufferProcs *lock_word;
#define LOCK_WORD ((PyBufferProcs *volatile *)&PyCapsule_Type.tp_as_buffer)
#define LOCKED (&empty_buffer_procs.procs)
#endif

static void lock_python_start(void)
{
    while (!__sync_bool_compare_and_swap(LOCK_WORD, (lock_word)0, LOCKED))
        sched_yield();
}

static void unlock_python_start(void)
{
    __sync_bool_compare_and_swap(LOCK_WORD, LOCKED, (lock_word)0);
}

/* The environment under `prefix`; -1 when there is no interpreter. */
static int use_prefix(environment *found, const char *prefix)
{
    int n = snprintf(found->executable, sizeof found->executable, "%s/bin/python3", prefix);
    int m = snprintf(found->site_packages, sizeof found->site_packages, "%s/lib/python%d.%d/site-packages", prefix,
                     PY_MAJOR_VERSION, PY_MINOR_VERSION);
    if (n >= N_PATH_BYTES || m >= N_PATH_BYTES)
        return -1;
    return access(found->executable, X_OK);
}

/* Its address lies in this library. */
static const char own_address = 0;

/* The environment that this library is installed in, wherever it was moved to; -1 when it lies elsewhere. */
static int use_own_place(environment *found)
{
    Dl_info here;
    char folder[32], prefix[N_PATH_BYTES];
    snprintf(folder, sizeof folder, "/lib/python%d.%d/", PY_MAJOR_VERSION, PY_MINOR_VERSION);
    if (!dladdr((void *)&own_address, &here))
        return -1;
    char *path = realpath(here.dli_fname, NULL);
    char *end = path ? strstr(path, folder) : NULL;
    int result = -1;
    if (end && (size_t)(end - path) < sizeof prefix) {
        memcpy(prefix, path, (size_t)(end - path));
        prefix[end - path] = 0;
        result = use_prefix(found, prefix);
    }
    free(path);
    return result;
}

static int find_environment(environment *found, char *message, size_t n_bytes)
{
    const char *home = getenv("WASI_NN_PYTHON_HOME");
    found->root = NULL;
    if (home && *home) {
        if (use_prefix(found, home) == 0)
            return 0;
        snprintf(message, n_bytes, "WASI_NN_PYTHON_HOME is %s, but there is no interpreter %s: set it to a Python %d.%d "
                 "environment with wasi-nn-backend installed", home, found->executable, PY_MAJOR_VERSION,
                 PY_MINOR_VERSION);
        return -1;
    }
    if (use_own_place(found) == 0)
        return 0;
    found->root = *WASI_NN_PACKAGE_ROOT ? WASI_NN_PACKAGE_ROOT : NULL;
    if (use_prefix(found, WASI_NN_PREFIX) == 0)
        return 0;
    snprintf(message, n_bytes, "the Python environment %s, which this library was built for, is gone: build the library "
             "again (wasi-nn capi --build DIR), or set WASI_NN_PYTHON_HOME", WASI_NN_PREFIX);
    return -1;
}

static PyStatus initialize(const environment *found)
{
    PyPreConfig before;
    PyConfig config;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1; /* else the file system's encoding comes from the locale, which is not ours to set */
    PyStatus status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status))
        return status;
    PyConfig_InitIsolatedConfig(&config);
    config.install_signal_handlers = 0;
    status = PyConfig_SetBytesString(&config, &config.executable, found->executable);
    if (!PyStatus_Exception(status))
        status = PyConfig_SetBytesString(&config, &config.program_name, found->executable);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    return status;
}

/* Whoever imports Python's module of signals first, gives SIGINT a handler where it has the default one, also with
 * install_signal_handlers off. It is imported here, and the handler taken away at once. */
static void keep_interrupt_handler(void)
{
    struct sigaction hosts;
    sigaction(SIGINT, NULL, &hosts);
    PyObject *module = PyImport_ImportModule("_signal");
    sigaction(SIGINT, &hosts, NULL);
    if (!module)
        PyErr_Clear(); /* the import of the package will fail in the same way, and say so */
    Py_XDECREF(module);
}

/* 1: started here; 0: it ran already; -1: it does not start. */
static int ensure_python(const environment *found, char *message, size_t n_bytes)
{
    lock_python_start();
    int result = 0;
    if (!Py_IsInitialized()) {
        PyStatus status = initialize(found);
        if (PyStatus_Exception(status)) {
            snprintf(message, n_bytes, "Python does not start from %s: %s (%s); is the environment damaged?",
                     found->executable, status.err_msg ? status.err_msg : "exit", status.func ? status.func : "?");
            result = -1;
        } else {
            keep_interrupt_handler();
            PyEval_SaveThread();
            result = 1;
        }
    }
    unlock_python_start();
    return result;
}

/* `own`: the interpreter is nobody else's. Search paths first: cffi's start-up imports _cffi_backend. */
static const char BOOTSTRAP[] =
    "def prepare(own, root, site_packages):\n"
    "    import sys, threading\n"
    "    if own:\n"
    "        sys.stdout = sys.stderr\n"
    "        threading.stack_size(8 << 20)\n"
    "    if root and root not in sys.path:\n"
    "        sys.path.insert(0, root)\n"
    "    if site_packages not in sys.path:\n"
    "        import site\n"
    "        site.addsitedir(site_packages)\n"
    "    from wasi_nn_backend.capi.serving import prepare\n"
    "    prepare(own)\n";

/* The pending exception in words. */
static void describe_exception(const environment *found, char *message, size_t n_bytes)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *text = value ? PyObject_Str(value) : NULL;
    const char *words = text ? PyUnicode_AsUTF8(text) : NULL;
    snprintf(message, n_bytes, "the Python environment of %s cannot be used: %s: %s", found->executable,
             type ? ((PyTypeObject *)type)->tp_name : "?", words ? words : "?");
    PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

static int import_package(int own, const environment *found, char *message, size_t n_bytes)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *names = PyDict_New();
    PyObject *defined = NULL, *done = NULL;
    if (names && PyDict_SetItemString(names, "__builtins__", PyEval_GetBuiltins()) == 0)
        defined = PyRun_String(BOOTSTRAP, Py_file_input, names, names);
    if (defined)
        done = PyObject_CallFunction(PyDict_GetItemString(names, "prepare"), "izs", own, found->root,
                                     found->site_packages);
    if (!done)
        describe_exception(found, message, n_bytes);
    int result = done ? 0 : -1;
    Py_XDECREF(done);
    Py_XDECREF(defined);
    Py_XDECREF(names);
    PyGILState_Release(state);
    return result;
}

static int start(char *message, size_t n_bytes)
{
    environment found;
    /* Hosts open this library with RTLD_LOCAL, and then the extension modules do not find Python's symbols. Where the
     * host's program is Python itself and has them built in, there is no such library, and no need. */
    dlopen(WASI_NN_LIBPYTHON, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
    const char *version = Py_GetVersion();
    size_t n_same = strlen(WASI_NN_PYTHON_VERSION);
    if (strncmp(version, WASI_NN_PYTHON_VERSION, n_same) != 0 || version[n_same] != '.') {
        snprintf(message, n_bytes, "this process runs Python %.8s, and the library was built for %s: build it for the "
                 "host's version", version, WASI_NN_PYTHON_VERSION);
        return -1;
    }
    if (find_environment(&found, message, n_bytes) != 0)
        return -1;
    int own = ensure_python(&found, message, n_bytes);
    return own < 0 ? -1 : import_package(own, &found, message, n_bytes);
}

int wasi_nn_start_python(char *message, size_t n_bytes)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    static int is_started;
    pthread_mutex_lock(&once);
    if (!is_started)
        is_started = start(message, n_bytes) == 0;
    int result = is_started ? 0 : -1;
    pthread_mutex_unlock(&once);
    return result;
}

/* A caller that holds Python's lock, as extension modules do, must not keep it while it waits for Python. */
void *wasi_nn_release_gil(void)
{
    if (!Py_IsInitialized())
        return NULL;
    PyThreadState *own = PyGILState_GetThisThreadState();
#if PY_VERSION_HEX < 0x030D0000
    PyThreadState *current = _PyThreadState_UncheckedGet();
#else
    PyThreadState *current = PyThreadState_GetUnchecked();
#endif
    return own && own == current ? PyEval_SaveThread() : NULL;
}

void wasi_nn_regain_gil(void *released)
{
    if (released)
        PyEval_RestoreThread(released);
}
