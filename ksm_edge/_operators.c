/* Operators of the gradient graph that ONNX Runtime has none of, for its sessions: what they compute is in _loops.h and
   the headers that it names, here is how ONNX Runtime calls them. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>

/* For any processor of its kind: of SSE 16 registers of 4 floats, of NEON 32 of them, two by two. */
#if defined(__aarch64__) || defined(__ARM_NEON)
enum { LANES = 8, TILE = 4, ROWS = 4, REGISTERS = 3 };
#else
enum { LANES = 4, TILE = 4, ROWS = 4, REGISTERS = 3 };
#endif
#define COMPARED 4

#include "_loops.h"

/* ---- ONNX Runtime's C interface: of its table of functions, which only grows at its end, the ones that are used ---- */

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct Operator Operator;

enum { TASKS = 16 };
enum { INTERFACE = 18, FLOAT = 1, REQUIRED = 0, DEFAULT_MEMORY = 0, FAILED = 1 };

typedef struct {
    OrtStatus *(*CreateStatus)(int code, const char *message);
    void *of_sessions[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **domain);
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const Operator *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
    void *of_runs[22];
    OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **data);
    void *of_types[33];
    OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name, float *value);
    void *of_attributes[4];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **value);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *shape, size_t rank,
                                          OrtValue **value);
    void *releasing[71];
    OrtStatus *(*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo *info, const char *name, int64_t *values,
                                                    size_t *count);
    void *of_providers[110];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*task)(void *work, size_t number),
                                            size_t tasks, size_t batches, void *work);
} OrtApi;

_Static_assert(offsetof(OrtApi, GetTensorMutableData) == 51 * sizeof(void *), "a function is missing");
_Static_assert(offsetof(OrtApi, KernelInfoGetAttributeArray_int64) == 163 * sizeof(void *), "a function is missing");
_Static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * sizeof(void *), "a function is missing");

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

struct Operator {
    uint32_t version;
    void *(*CreateKernel)(const Operator *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const Operator *op);
    const char *(*GetExecutionProviderType)(const Operator *op);
    int (*GetInputType)(const Operator *op, size_t index);
    size_t (*GetInputTypeCount)(const Operator *op);
    int (*GetOutputType)(const Operator *op, size_t index);
    size_t (*GetOutputTypeCount)(const Operator *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const Operator *op, size_t index);
    int (*GetOutputCharacteristic)(const Operator *op, size_t index);
    int (*GetInputMemoryType)(const Operator *op, size_t index);
    int (*of_variadic[4])(const Operator *op);
    OrtStatus *(*CreateKernelV2)(const Operator *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*InferOutputShapeFn)(const Operator *op, void *context);
    int (*GetStartVersion)(const Operator *op);
    int (*GetEndVersion)(const Operator *op);
    size_t (*GetMayInplace)(int **inputs, int **outputs);
    void (*ReleaseMayInplace)(int *inputs, int *outputs);
    size_t (*GetAliasMap)(int **inputs, int **outputs);
    void (*ReleaseAliasMap)(int *inputs, int *outputs);
    /* from here on this project's own */
    const char *name;
    size_t inputs, outputs;
};

typedef struct {
    const OrtApi *api;
    union {
        Depthwise depthwise;
        Gate gate;
        Winograd winograd;
        Sliding sliding;
        Product product;
        int64_t kernels[2]; /* out-channels and in-channels */
    };
} Kernel;

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        OrtStatus *status = (call);                                                                                    \
        if (status)                                                                                                    \
            return status;                                                                                             \
    } while (0)

static OrtStatus *input(const Kernel *k, OrtKernelContext *context, size_t index, const float **data)
{
    const OrtValue *value;
    TRY(k->api->KernelContext_GetInput(context, index, &value));
    return k->api->GetTensorMutableData((OrtValue *)value, (void **)data);
}

static OrtStatus *output(const Kernel *k, OrtKernelContext *context, size_t index, const int64_t *shape, size_t rank,
                         float **data)
{
    OrtValue *value;
    TRY(k->api->KernelContext_GetOutput(context, index, shape, rank, &value));
    return k->api->GetTensorMutableData(value, (void **)data);
}

static OrtStatus *no_memory(const OrtApi *api)
{
    return api->CreateStatus(FAILED, "there is no memory left for an operator's room");
}

/* Rooms to work in, of all sessions: as many as operators ever ran at once, each as large as any that was asked of it.
   ONNX Runtime would hold an output that nobody reads until the run's end, and its arena would place a room, or what
   comes behind it, elsewhere every time; from the heap the pages of a large one would be new every time. */
typedef struct Room {
    struct Room *next;
    int64_t floats;
    float data[];
} Room;

static pthread_mutex_t of_rooms = PTHREAD_MUTEX_INITIALIZER;
static Room *idle;
static int64_t kernels;

/* NULL where memory ran out. */
static Room *take_room(int64_t floats)
{
    pthread_mutex_lock(&of_rooms);
    Room *room = idle;
    if (room)
        idle = room->next;
    pthread_mutex_unlock(&of_rooms);
    if (!room || room->floats < floats) {
        free(room);
        room = malloc(sizeof(Room) + (size_t)floats * sizeof(float));
        if (room)
            room->floats = floats;
    }
    return room;
}

static void give_back(Room *room)
{
    pthread_mutex_lock(&of_rooms);
    room->next = idle;
    idle = room;
    pthread_mutex_unlock(&of_rooms);
}

/* The rooms go with the last kernel. */
static void count_kernel(int64_t more)
{
    Room *room = NULL;
    pthread_mutex_lock(&of_rooms);
    kernels += more;
    if (!kernels)
        room = idle, idle = NULL;
    pthread_mutex_unlock(&of_rooms);
    while (room) {
        Room *next = room->next;
        free(room);
        room = next;
    }
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static OrtStatus *inputs(const Kernel *k, OrtKernelContext *context, const float **const *given, size_t count)
{
    for (size_t i = 0; i < count; i++)
        TRY(input(k, context, i, given[i]));
    return NULL;
}

/* Those from `first` on which have a number for each channel. */
static OrtStatus *vectors(const Kernel *k, OrtKernelContext *context, size_t first, float **const *made, size_t count)
{
    for (size_t i = 0; i < count; i++)
        TRY(output(k, context, first + i, &k->depthwise.channels, 1, made[i]));
    return NULL;
}

static OrtStatus *numbers(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *values, size_t count)
{
    return api->KernelInfoGetAttributeArray_int64(info, name, values, &count);
}

/* ---- Loops, by what the processor has ---- */

static const Loops plain = ALL_LOOPS, *loops = &plain;
static Multiply *multiply_halves = ksm_edge_half_product_plain;

typedef struct {
    const char *name;
    const Loops *loops;
    Multiply *halves; /* or this */
} Choice;

/* The widest first, and the fastest. */
static const Choice all_loops[] = {
#ifdef WIDER_LOOPS
    {"avx512", .loops = &ksm_edge_avx512},
    {"avx2", .loops = &ksm_edge_avx2},
#endif
    {"plain", .loops = &plain},
};
static const Choice all_halves[] = {
#ifdef PAIRED_HALVES
    {"avx512_bf16", .halves = ksm_edge_half_product_avx512},
#endif
    {"plain", .halves = ksm_edge_half_product_plain},
};

static int can_run(const Choice *choice)
{
#ifdef WIDER_LOOPS
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (choice->loops == &ksm_edge_avx512)
        return avx512;
    if (choice->loops == &ksm_edge_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef PAIRED_HALVES
    if (choice->halves == ksm_edge_half_product_avx512)
        return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
    (void)choice;
    return 1;
}

static void choose(const Choice *choice)
{
    if (choice->loops)
        loops = choice->loops;
    else
        multiply_halves = choice->halves;
}

/* Channels in TASKS parts, on as many threads as the session has: but for what has one room for all. */
typedef struct {
    Run *run;
    const void *work;
    int64_t channels;
    int done[TASKS];
} Parts;

static void part(void *parts, size_t number)
{
    Parts *p = parts;
    int64_t i = (int64_t)number;
    p->done[i] = p->run(p->work, i * p->channels / TASKS, (i + 1) * p->channels / TASKS);
}

static OrtStatus *in_parts(const Kernel *k, OrtKernelContext *context, int64_t channels, Run *run, const void *work)
{
    Parts parts = {run, work, channels, {0}};
    TRY(k->api->KernelContext_ParallelFor(context, part, TASKS, 0, &parts));
    for (int i = 0; i < TASKS; i++)
        if (!parts.done[i])
            return no_memory(k->api);
    return NULL;
}

static OrtStatus *compute_forward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Forward f = {.d = d};
    const float **given[] = {&f.x, &f.weight, &f.scale, &f.bias};
    TRY(inputs(k, context, given, COUNT(given)));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->channels, d->h, d->w}, 4, &f.y));
    return in_parts(k, context, d->channels, loops->forward, &f);
}

static OrtStatus *compute_backward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Backward b = {.d = d};
    const float **given[] = {&b.dy, &b.y, &b.x, &b.weight, &b.scale, &b.bias, &b.product_before, &b.dbias_before};
    TRY(inputs(k, context, given, COUNT(given)));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->channels, d->H, d->W}, 4, &b.dx));
    float **made[] = {&b.product, &b.dbias, &b.sums};
    TRY(vectors(k, context, 1, made, COUNT(made)));
    return in_parts(k, context, d->channels, loops->backward, &b);
}

static OrtStatus *compute_widened_forward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Forward f = {.d = d};
    const float **given[] = {&f.x, &f.wide, &f.shift, &f.weight, &f.scale, &f.bias};
    TRY(inputs(k, context, given, COUNT(given)));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->channels, d->h, d->w}, 4, &f.y));
    Room *room = take_room(GROUP * d->H * d->W);
    if (!room)
        return no_memory(k->api);
    f.planes = room->data;
    int done = loops->widened_forward(&f);
    give_back(room);
    return done ? NULL : no_memory(k->api);
}

static OrtStatus *compute_widened_backward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Backward b = {.d = d};
    const float **given[] = {&b.dy, &b.y, &b.x, &b.wide, &b.shift, &b.weight, &b.scale, &b.bias,
                             &b.wide_product_before, &b.shift_before, &b.product_before, &b.dbias_before};
    TRY(inputs(k, context, given, COUNT(given)));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->inside, d->H, d->W}, 4, &b.dx));
    TRY(output(k, context, 1, (int64_t[]){d->channels, d->inside}, 2, &b.wide_product));
    float **made[] = {&b.dshift, &b.product, &b.dbias};
    TRY(vectors(k, context, 2, made, COUNT(made)));
    Room *room = take_room(GROUP * d->H * d->W);
    if (!room)
        return no_memory(k->api);
    b.planes = room->data;
    int done = loops->widened_backward(&b);
    give_back(room);
    return done ? NULL : no_memory(k->api);
}

static OrtStatus *compute_gate(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const int64_t *shape = k->gate.shape;
    Gating g = {.g = &k->gate};
    TRY(input(k, context, 0, &g.dy));
    TRY(input(k, context, 1, &g.y));
    TRY(output(k, context, 0, shape, 4, &g.dz));
    TRY(output(k, context, 1, &shape[1], 1, &g.sums));
    return in_parts(k, context, shape[1], loops->gate, &g);
}

/* (n, C, rows, columns) -> (36, C, tiles) or back */
static OrtStatus *compute_transform(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Winograd *g = &k->winograd;
    Transform f = {.g = g};
    TRY(input(k, context, 0, &f.from));
    if (g->way == OUTPUT)
        TRY(input(k, context, 1, &f.bias));
    if (g->way == INPUT || g->way == OUTPUT_GRADIENT)
        TRY(output(k, context, 0, (int64_t[]){PLACES, g->channels, tiles_of(g).total}, 3, &f.to));
    else
        TRY(output(k, context, 0, (int64_t[]){g->images, g->channels, g->rows, g->columns}, 4, &f.to));
    return in_parts(k, context, g->channels, loops->transform, &f);
}

static OrtStatus *compute_contraction(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    Contraction c = {.kernels = k->kernels[0] * k->kernels[1]};
    const float **given[] = {&c.weight, &c.gradient, &c.before};
    TRY(inputs(k, context, given, COUNT(given)));
    TRY(output(k, context, 0, k->kernels, 2, &c.product));
    return in_parts(k, context, c.kernels, loops->contract, &c);
}

static OrtStatus *compute_windows(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Sliding *s = &k->sliding;
    Windows f = {.s = s};
    TRY(input(k, context, 0, &f.x));
    TRY(output(k, context, 0, (int64_t[]){s->images, s->taps * s->channels, s->h, s->w}, 4, &f.made));
    return in_parts(k, context, s->channels, loops->windows, &f);
}

static OrtStatus *compute_pool_gradient(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Sliding *s = &k->sliding;
    Pooling f = {.s = s};
    const float **given[] = {&f.dy, &f.x};
    TRY(inputs(k, context, given, COUNT(given)));
    TRY(output(k, context, 0, (int64_t[]){s->images, s->channels, s->H, s->W}, 4, &f.dx));
    return in_parts(k, context, s->channels, loops->pool_gradient, &f);
}

/* In one thread: others have runs of their own. */
static OrtStatus *multiplied(const Kernel *k, OrtKernelContext *context, int64_t terms, Multiply *multiply_words)
{
    const Product *p = &k->product;
    Multiplication m = {.p = p};
    const float **given[] = {&m.left, &m.right, &m.before};
    TRY(inputs(k, context, given, p->start == NOTHING ? 2 : 3));
    TRY(output(k, context, 0, p->made, p->rank, &m.made));
    Room *room = take_room(room_words(p, terms));
    if (!room)
        return no_memory(k->api);
    m.room = room->data;
    multiply_words(m);
    give_back(room);
    return NULL;
}

static OrtStatus *compute_product(void *kernel, OrtKernelContext *context)
{
    return multiplied(kernel, context, 1, loops->multiply);
}

static OrtStatus *compute_half_product(void *kernel, OrtKernelContext *context)
{
    return multiplied(kernel, context, 2, multiply_halves);
}

static OrtStatus *activation_of(const OrtApi *api, const OrtKernelInfo *info, const char *kind, const char *low,
                                const char *high, Activation *activation)
{
    TRY(numbers(api, info, kind, &activation->kind, 1));
    TRY(api->KernelInfoGetAttribute_float(info, low, &activation->low));
    return api->KernelInfoGetAttribute_float(info, high, &activation->high);
}

static OrtStatus *read_depthwise(const OrtApi *api, const OrtKernelInfo *info, int is_widened, Depthwise *d)
{
    int64_t image[4], result[4];
    TRY(numbers(api, info, "image_shape", image, 4));
    TRY(numbers(api, info, "output_shape", result, 4));
    TRY(numbers(api, info, "kernel_shape", d->kernel, 2));
    TRY(numbers(api, info, "strides", d->strides, 2));
    TRY(numbers(api, info, "pads", d->pads, 4));
    d->images = image[0], d->inside = image[1], d->H = image[2], d->W = image[3];
    d->channels = result[1], d->h = result[2], d->w = result[3];
    for (int i = 0; i < 2; i++) {
        int64_t k = d->kernel[i], step = d->strides[i], front = d->pads[i], back = d->pads[i + 2];
        if (k < 1 || k > MAX_TAPS || step < 1 || step > MAX_STRIDE || front < 0 || front >= k || back < 0 || back >= k)
            return api->CreateStatus(FAILED, "this kernel, stride or padding is beyond the operator");
    }
    if (d->kernel[0] * d->kernel[1] > MAX_TAPS)
        return api->CreateStatus(FAILED, "the kernel has too many taps");
    if (is_widened ? d->inside % 2 || d->inside > MAX_INSIDE : d->inside != d->channels)
        return api->CreateStatus(FAILED, "these channels in front are beyond the operator");
    TRY(activation_of(api, info, "input_kind", "input_low", "input_high", &d->before));
    return activation_of(api, info, "kind", "low", "high", &d->behind);
}

static OrtStatus *read_gate(const OrtApi *api, const OrtKernelInfo *info, Gate *g)
{
    TRY(numbers(api, info, "image_shape", g->shape, 4));
    return activation_of(api, info, "kind", "low", "high", &g->activation);
}

static OrtStatus *read_winograd(const OrtApi *api, const OrtKernelInfo *info, Way way, Winograd *g)
{
    int64_t image[4], result[4], *plane = way == INPUT || way == INPUT_GRADIENT ? image : result;
    TRY(numbers(api, info, "image_shape", image, 4));
    TRY(numbers(api, info, "output_shape", result, 4));
    TRY(numbers(api, info, "pads", g->pads, 2));
    if (least(g->pads[0], g->pads[1]) < 0 || g->pads[0] > SIDE - STEP || g->pads[1] > SIDE - STEP)
        return api->CreateStatus(FAILED, "this padding is beyond the operator");
    g->way = way, g->images = plane[0], g->channels = plane[1], g->rows = plane[2], g->columns = plane[3];
    g->h = result[2], g->w = result[3];
    if (plane == result)
        g->pads[0] = g->pads[1] = 0;
    return NULL;
}

static OrtStatus *read_sliding(const OrtApi *api, const OrtKernelInfo *info, Sliding *s)
{
    int64_t image[4], result[4];
    TRY(numbers(api, info, "image_shape", image, 4));
    TRY(numbers(api, info, "output_shape", result, 4));
    TRY(numbers(api, info, "kernel_shape", s->kernel, 2));
    TRY(numbers(api, info, "strides", s->strides, 2));
    TRY(numbers(api, info, "dilations", s->dilations, 2));
    TRY(numbers(api, info, "pads", s->pads, 2));
    TRY(numbers(api, info, "first", &s->first, 1));
    for (int i = 0; i < 2; i++)
        if (s->kernel[i] < 1 || s->strides[i] < 1 || s->dilations[i] < 1 || s->pads[i] < 0)
            return api->CreateStatus(FAILED, "this kernel, stride, dilation or padding is beyond the operator");
    s->images = image[0], s->channels = image[1], s->H = image[2], s->W = image[3], s->h = result[2], s->w = result[3];
    s->taps = result[1] / s->channels;
    if (s->first < 0 || s->first + s->taps > s->kernel[0] * s->kernel[1])
        return api->CreateStatus(FAILED, "the kernel does not have so many taps");
    return NULL;
}

static OrtStatus *read_product(const OrtApi *api, const OrtKernelInfo *info, Product *p)
{
    int64_t sides[4];
    TRY(numbers(api, info, "sides", sides, 4));
    TRY(numbers(api, info, "summed", &p->summed, 1));
    TRY(numbers(api, info, "turned", &p->turned, 1));
    TRY(numbers(api, info, "start", &p->start, 1));
    if (p->turned && p->summed)
        return api->CreateStatus(FAILED, "this product is beyond the operator");
    p->images = sides[0], p->rows = sides[1], p->columns = sides[2], p->depth = sides[3], p->rank = MOST_SIDES;
    return api->KernelInfoGetAttributeArray_int64(info, "output_shape", p->made, &p->rank);
}

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);

static const char *name_of(const Operator *op)
{
    return op->name;
}

static const char *anywhere(const Operator *op)
{
    (void)op;
    return NULL;
}

static int type_of(const Operator *op, size_t index)
{
    (void)op, (void)index;
    return FLOAT;
}

static size_t inputs_of(const Operator *op)
{
    return op->inputs;
}

static size_t outputs_of(const Operator *op)
{
    return op->outputs;
}

static int required(const Operator *op, size_t index)
{
    (void)op, (void)index;
    return REQUIRED;
}

static int in_main_memory(const Operator *op, size_t index)
{
    (void)op, (void)index;
    return DEFAULT_MEMORY;
}

static int one(const Operator *op)
{
    (void)op;
    return 1;
}

static size_t nowhere(int **inputs, int **outputs)
{
    (void)inputs, (void)outputs;
    return 0;
}

/* Results may take the memory of what they are made from, where nobody reads that later. */
static size_t first_over(int *from, int **inputs, int **outputs)
{
    static int results[] = {0};
    *inputs = from, *outputs = results;
    return 1;
}

static size_t over_pixels(int **inputs, int **outputs)
{
    static int from[] = {2};
    return first_over(from, inputs, outputs);
}

static size_t over_gradient(int **inputs, int **outputs)
{
    static int from[] = {0};
    return first_over(from, inputs, outputs);
}

static void keep(int *inputs, int *outputs)
{
    (void)inputs, (void)outputs;
}

static void destroy(void *kernel)
{
    free(kernel);
    count_kernel(-1);
}

#define OPERATOR(NAME, INPUTS, OUTPUTS, COMPUTE, MAY_INPLACE)                                                          \
    {                                                                                                                  \
        .version = INTERFACE, .GetName = name_of, .GetExecutionProviderType = anywhere, .GetInputType = type_of,       \
        .GetInputTypeCount = inputs_of, .GetOutputType = type_of, .GetOutputTypeCount = outputs_of,                    \
        .KernelDestroy = destroy, .GetInputCharacteristic = required, .GetOutputCharacteristic = required,             \
        .GetInputMemoryType = in_main_memory, .of_variadic = {one, one, one, one}, .CreateKernelV2 = create,           \
        .KernelComputeV2 = COMPUTE, .GetStartVersion = one, .GetEndVersion = one, .GetMayInplace = MAY_INPLACE,        \
        .ReleaseMayInplace = keep, .GetAliasMap = nowhere, .ReleaseAliasMap = keep, .name = NAME, .inputs = INPUTS,    \
        .outputs = OUTPUTS,                                                                                            \
    }

enum {
    DEPTHWISE,
    DEPTHWISE_GRADIENT,
    WIDENED,
    WIDENED_GRADIENT,
    GATE,
    WINOGRAD_INPUT,
    WINOGRAD_INPUT_GRADIENT,
    WINOGRAD_OUTPUT,
    WINOGRAD_OUTPUT_GRADIENT,
    CONTRACTION,
    WINDOWS,
    MAX_POOL_GRADIENT,
    PRODUCT,
    PRODUCT_FROM,
    HALF_PRODUCT,
    HALF_PRODUCT_FROM,
    OPERATORS
};

static const Operator operators[OPERATORS] = {
    [DEPTHWISE] = OPERATOR("Depthwise", 4, 1, compute_forward, nowhere),
    [DEPTHWISE_GRADIENT] = OPERATOR("DepthwiseGradient", 8, 4, compute_backward, over_pixels),
    [WIDENED] = OPERATOR("WidenedDepthwise", 6, 1, compute_widened_forward, nowhere),
    [WIDENED_GRADIENT] = OPERATOR("WidenedDepthwiseGradient", 12, 5, compute_widened_backward, nowhere),
    [GATE] = OPERATOR("Gate", 2, 2, compute_gate, over_gradient),
    [WINOGRAD_INPUT] = OPERATOR("WinogradInput", 1, 1, compute_transform, nowhere),
    [WINOGRAD_INPUT_GRADIENT] = OPERATOR("WinogradInputGradient", 1, 1, compute_transform, nowhere),
    [WINOGRAD_OUTPUT] = OPERATOR("WinogradOutput", 2, 1, compute_transform, nowhere),
    [WINOGRAD_OUTPUT_GRADIENT] = OPERATOR("WinogradOutputGradient", 1, 1, compute_transform, nowhere),
    [CONTRACTION] = OPERATOR("Contraction", 3, 1, compute_contraction, nowhere),
    [WINDOWS] = OPERATOR("Windows", 1, 1, compute_windows, nowhere),
    [MAX_POOL_GRADIENT] = OPERATOR("MaxPoolGradient", 2, 1, compute_pool_gradient, nowhere),
    [PRODUCT] = OPERATOR("Product", 2, 1, compute_product, nowhere),
    [PRODUCT_FROM] = OPERATOR("ProductFrom", 3, 1, compute_product, nowhere),
    [HALF_PRODUCT] = OPERATOR("HalfProduct", 2, 1, compute_half_product, nowhere),
    [HALF_PRODUCT_FROM] = OPERATOR("HalfProductFrom", 3, 1, compute_half_product, nowhere),
};

static OrtStatus *read_attributes(ptrdiff_t number, const OrtApi *api, const OrtKernelInfo *info, Kernel *k)
{
    switch (number) {
    case GATE: return read_gate(api, info, &k->gate);
    case CONTRACTION: return numbers(api, info, "kernels", k->kernels, 2);
    case PRODUCT:
    case PRODUCT_FROM:
    case HALF_PRODUCT:
    case HALF_PRODUCT_FROM: return read_product(api, info, &k->product);
    case WINDOWS:
    case MAX_POOL_GRADIENT: return read_sliding(api, info, &k->sliding);
    case WINOGRAD_INPUT: return read_winograd(api, info, INPUT, &k->winograd);
    case WINOGRAD_INPUT_GRADIENT: return read_winograd(api, info, INPUT_GRADIENT, &k->winograd);
    case WINOGRAD_OUTPUT: return read_winograd(api, info, OUTPUT, &k->winograd);
    case WINOGRAD_OUTPUT_GRADIENT: return read_winograd(api, info, OUTPUT_GRADIENT, &k->winograd);
    default: return read_depthwise(api, info, number == WIDENED || number == WIDENED_GRADIENT, &k->depthwise);
    }
}

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel)
{
    Kernel *k = calloc(1, sizeof(Kernel));
    if (!k)
        return api->CreateStatus(FAILED, "there is no memory left for a kernel");
    k->api = api;
    OrtStatus *status = read_attributes(op - operators, api, info, k);
    count_kernel(1);
    if (status)
        destroy(k);
    else
        *kernel = k;
    return status;
}

/* What `SessionOptions.register_custom_ops_library` looks for. The domain is made once and lives on. */
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    static OrtCustomOpDomain *domain;
    const OrtApi *api = base->GetApi(INTERFACE);
    if (!api)
        return base->GetApi(1)->CreateStatus(FAILED, "this ONNX Runtime is older than 1.18");
    if (!domain) {
        OrtCustomOpDomain *fresh;
        TRY(api->CreateCustomOpDomain("ksm_edge", &fresh));
        for (int i = 0; i < OPERATORS; i++)
            TRY(api->CustomOpDomain_Add(fresh, &operators[i]));
        domain = fresh;
    }
    return api->AddCustomOpDomain(options, domain);
}

/* ---- For Python: which loops there are, and which are run ---- */

static PyObject *names_of(const Choice *choices, size_t count)
{
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < count; i++) {
        PyObject *name = can_run(&choices[i]) ? PyUnicode_FromString(choices[i].name) : NULL;
        if (name && PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *choose_by_name(const Choice *choices, size_t count, PyObject *name, const char *refusal)
{
    const char *wanted = PyUnicode_AsUTF8(name);
    for (size_t i = 0; wanted && i < count; i++)
        if (!strcmp(choices[i].name, wanted) && can_run(&choices[i])) {
            choose(&choices[i]);
            Py_RETURN_NONE;
        }
    if (wanted)
        PyErr_Format(PyExc_ValueError, refusal, name);
    return NULL;
}

static PyObject *py_loops(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    return names_of(all_loops, COUNT(all_loops));
}

static PyObject *py_running(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    size_t i = 0;
    while (all_loops[i].loops != loops)
        i++;
    return PyUnicode_FromString(all_loops[i].name);
}

static PyObject *py_run_with(PyObject *module, PyObject *name)
{
    (void)module;
    return choose_by_name(all_loops, COUNT(all_loops), name, "%R: no loops that can run here");
}

static PyObject *py_halves(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    return names_of(all_halves, COUNT(all_halves));
}

static PyObject *py_halve_with(PyObject *module, PyObject *name)
{
    (void)module;
    return choose_by_name(all_halves, COUNT(all_halves), name, "%R: no products in half precision that can run here");
}

static PyMethodDef methods[] = {
    {"halves", py_halves, METH_NOARGS, "Ways to multiply in half precision, the fastest first; plain ones gain nothing."},
    {"halve_with", py_halve_with, METH_O, "Multiply so from here on, in place of the fastest way."},
    {"loops", py_loops, METH_NOARGS, "Names of the loops that this processor can run, the widest first."},
    {"running", py_running, METH_NOARGS, "The name of those that are run."},
    {"run_with", py_run_with, METH_O, "Run those of that name from here on, in place of the widest."},
    {NULL, NULL, 0, NULL},
};

static void choose_first(const Choice *choices, size_t count)
{
    for (size_t i = count; i-- > 0;)
        if (can_run(&choices[i]))
            choose(&choices[i]);
}

/* ONNX Runtime opens the same file: what is chosen here is chosen for it. */
PyMODINIT_FUNC PyInit__operators(void)
{
    static struct PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, .m_name = "ksm_edge._operators", .m_size = -1, .m_methods = methods};
    choose_first(all_loops, COUNT(all_loops));
    choose_first(all_halves, COUNT(all_halves));
    return PyModule_Create(&definition);
}
