/* ghostgram for C and for everything that can call C: the kernels behind the Python package, on pointers.
 *
 * One struct of arguments and one function per op; docs/c_api.md has the rules, docs/ops/<op>.md the mathematics.
 *
 * - Begin a struct of arguments as `ghostgram_grad_stats_args args = {.struct_size = sizeof args};` (in C++ before 20:
 *   `args{}`, then the size): what later versions add is then 0, which means what this version does. Structs without
 *   struct_size never grow.
 * - A function that cannot do what is asked returns a status other than GHOSTGRAM_OK and writes to no output;
 *   ghostgram_last_error() says which argument was wrong, what was expected and what came.
 * - Strides count elements, of any sign for inputs, where 0 repeats one row. The innermost axis is contiguous where no
 *   stride is named for it. Outputs are contiguous but for the row strides named, and overlap neither inputs nor each
 *   other.
 * - An output that is not wanted is null, unless said otherwise. An array without elements may be null.
 * - "Sums" are float32, and float64 where the inputs are. Results have the same bits for any number of threads.
 * - Sizes may be 0.
 *
 * Functions ending in _cuda launch on `stream` (a cudaStream_t; null is the default one), on the current device, where
 * all arrays lie; they neither allocate nor wait. `workspace` is device memory that begins at a multiple of 16, of as
 * many bytes as the function ending in _cuda_workspace tells for the same args. In a library built without CUDA both
 * return GHOSTGRAM_NO_CUDA.
 */
#ifndef GHOSTGRAM_GHOSTGRAM_H
#define GHOSTGRAM_GHOSTGRAM_H

#include <stddef.h>
#include <stdint.h>

#define GHOSTGRAM_VERSION_MAJOR 0
#define GHOSTGRAM_VERSION_MINOR 1
#define GHOSTGRAM_VERSION_PATCH 0

#if defined(__GNUC__)
#define GHOSTGRAM_API __attribute__((visibility("default")))
#else
#define GHOSTGRAM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- What is common -------------------------------------------------------------------------------------------- */

typedef int32_t ghostgram_status;
enum {
  GHOSTGRAM_OK = 0,
  GHOSTGRAM_INVALID = 1,    /* an argument was refused */
  GHOSTGRAM_NO_MEMORY = 2,  /* scratch memory could not be had; outputs may be half written */
  GHOSTGRAM_NO_CUDA = 3,    /* this library was built without CUDA */
  GHOSTGRAM_CUDA_ERROR = 4, /* CUDA refused a launch; outputs may be half written */
  GHOSTGRAM_INTERNAL = 5    /* a defect of ghostgram */
};

typedef int32_t ghostgram_dtype;
/* 0 is none of them, so that one forgotten is refused. */
enum {
  GHOSTGRAM_FLOAT32 = 1,
  GHOSTGRAM_FLOAT64 = 2,
  GHOSTGRAM_BFLOAT16 = 3,
  GHOSTGRAM_FLOAT16 = 4,
  GHOSTGRAM_INT32 = 5,
  GHOSTGRAM_INT64 = 6,
  GHOSTGRAM_BOOL = 7 /* a byte, 0 or 1 */
};

/* The version of the library that runs, as "0.1.0"; the macros above are those it was compiled against. */
GHOSTGRAM_API const char *ghostgram_version(void);

/* What the last call of this thread that failed had to say; "" before any. Valid until the thread's next failure. */
GHOSTGRAM_API const char *ghostgram_last_error(void);

/* The instruction set in use: "baseline", "avx2", "avx512", "avx512bf16"; the variable GHOSTGRAM_ISA lowers it. */
GHOSTGRAM_API const char *ghostgram_isa(void);

/* "on", or "off, because ...". */
GHOSTGRAM_API const char *ghostgram_cuda_state(void);

/* How many threads an op may use, the caller's among them: the cores of the process, or GHOSTGRAM_NUM_THREADS, unless
 * set to something from 1 to 4096. It is the same for all threads. */
GHOSTGRAM_API int32_t ghostgram_num_threads(void);
GHOSTGRAM_API ghostgram_status ghostgram_set_num_threads(int32_t threads);

/* ---- grad_stats -------------------------------------------------------------------------------------------------
 *
 * All from one pass over the per-sample gradients G_i = sum_t b_it a_it^T (p, d) of a linear layer.
 *
 *   weight_grad = sum_i G_i    norms2_i = ||G_i||_F^2    dots_ik = <G_i, D_k>
 */
typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype;                     /* of a and b: floating */
  ghostgram_dtype direction_dtype;           /* of D: that, or that of the sums; read where K > 0 */
  int32_t accumulate;                        /* 0: weight_grad is overwritten; 1: added to */
  int32_t reserved;                          /* 0 */
  int64_t samples, tokens, d, p, directions; /* B, T, d, p, K */
  const void *a;                             /* (B, T, d) inputs of the layer */
  int64_t a_sample, a_token;
  const void *b; /* (B, T, p) gradients of its outputs */
  int64_t b_sample, b_token;
  const void *D; /* (K, p, d) */
  int64_t D_direction, D_row;
  void *weight_grad; /* (p, d) in the dtype of the sums, like all outputs */
  int64_t weight_grad_row;
  void *norms2; /* (B) */
  void *dots;   /* (B, K); wanted where K > 0 */
} ghostgram_grad_stats_args;

GHOSTGRAM_API ghostgram_status ghostgram_grad_stats(const ghostgram_grad_stats_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_grad_stats_cuda_workspace(const ghostgram_grad_stats_args *args,
                                                                   size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_grad_stats_cuda(const ghostgram_grad_stats_args *args, void *workspace,
                                                         size_t workspace_bytes, void *stream); /* not float64 */

/* ---- grad_gram --------------------------------------------------------------------------------------------------
 *
 * Inner products of the per-sample gradients of two batches of a linear layer, or of one with itself.
 *
 *   out_ij = <G_i, G'_j>    out_i = ||G_i||_F^2 where `diagonal`
 */
typedef struct {
  int64_t samples, tokens; /* B, T */
  const void *a;           /* (B, T, d) */
  int64_t a_sample, a_token;
  const void *b; /* (B, T, p) */
  int64_t b_sample, b_token;
} ghostgram_grad_gram_side;

typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype; /* of every a and b: floating */
  int32_t diagonal;      /* 1: out is (B), and there is no right side */
  int64_t d, p;
  ghostgram_grad_gram_side left;
  const ghostgram_grad_gram_side *right; /* null: the left one again, in half the time */
  void *out;                             /* (B, B2) in the dtype of the sums; always wanted */
  int64_t out_row;                       /* of no meaning where `diagonal` */
} ghostgram_grad_gram_args;

GHOSTGRAM_API ghostgram_status ghostgram_grad_gram(const ghostgram_grad_gram_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_grad_gram_cuda_workspace(const ghostgram_grad_gram_args *args, size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_grad_gram_cuda(const ghostgram_grad_gram_args *args, void *workspace,
                                                        size_t workspace_bytes, void *stream); /* not float64 */

/* ---- embedding_stats --------------------------------------------------------------------------------------------
 *
 * Per-sample gradients of an embedding table, G_i[v] = sum_{t: id_it = v} b_it.
 *
 *   norms2_i = ||G_i||_F^2    dots_ik = <G_i, D_k>
 */
typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype;                         /* of b: floating */
  ghostgram_dtype id_dtype;                      /* INT32 or INT64 */
  ghostgram_dtype direction_dtype;               /* of D: that of b, or of the sums */
  int32_t has_padding_idx;                       /* 1: positions with id == padding_idx add nothing */
  int64_t padding_idx;                           /* >= 0 */
  int64_t samples, tokens, features, directions; /* B, T < 2^31, E, K */
  int64_t rows;                                  /* V; read where K > 0 */
  const void *ids; /* (B, T), 0 <= id, and id < V where K > 0: others are refused on the CPU, and make NaN on a card */
  int64_t id_sample, id_token;
  const void *b; /* (B, T, E) gradients of the looked-up rows */
  int64_t b_sample, b_token;
  const void *D; /* (K, V, E) */
  int64_t D_direction, D_row;
  void *norms2; /* (B) in the dtype of the sums, like dots */
  void *dots;   /* (B, K); wanted where K > 0 */
} ghostgram_embedding_stats_args;

GHOSTGRAM_API ghostgram_status ghostgram_embedding_stats(const ghostgram_embedding_stats_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_embedding_stats_cuda_workspace(const ghostgram_embedding_stats_args *args,
                                                                        size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_embedding_stats_cuda(const ghostgram_embedding_stats_args *args,
                                                              void *workspace, size_t workspace_bytes, void *stream);

/* ---- affine_stats -----------------------------------------------------------------------------------------------
 *
 * Per-sample gradients of the scale and shift of a normalisation layer, or of a bias.
 *
 *   W_i = sum_t b_it * xhat_it,  V_i = sum_t b_it,  xhat = (x - mean) * rstd
 *   weight.grad = sum_i W_i    weight.norms2_i = ||W_i||^2    weight.dots_ik = <W_i, weight.D_k>    bias: the same of V
 */
typedef struct {
  const void *D; /* (K, F) */
  int64_t directions, D_direction;
  void *grad;   /* (F) */
  void *norms2; /* (B) */
  void *dots;   /* (B, K); wanted where K > 0 */
} ghostgram_affine_part;

typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype;             /* of b and x: floating; all else has that of the sums */
  int32_t channels_first;            /* 0: b and x are (B, T, F); 1: (B, F, T) */
  int64_t samples, tokens, features; /* B, T, F */
  int64_t groups;                    /* G, a divisor of F: read where channels_first and mean or rstd is given */
  const void *b;                     /* gradients of the layer's outputs */
  int64_t b_sample, b_row;           /* a row is a token, or a channel where channels_first */
  const void *x;                     /* inputs of the layer; null where `weight` asks for nothing */
  int64_t x_sample, x_row;
  const void *mean; /* (B, T), or (B, G) where channels_first; null: 0 */
  int64_t mean_sample, mean_step;
  const void *rstd; /* the same; null: 1 */
  int64_t rstd_sample, rstd_step;
  ghostgram_affine_part weight, bias;
} ghostgram_affine_stats_args;

GHOSTGRAM_API ghostgram_status ghostgram_affine_stats(const ghostgram_affine_stats_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_affine_stats_cuda_workspace(const ghostgram_affine_stats_args *args,
                                                                     size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_affine_stats_cuda(const ghostgram_affine_stats_args *args, void *workspace,
                                                           size_t workspace_bytes, void *stream);

/* ---- gumbel_topk ------------------------------------------------------------------------------------------------
 *
 * The best k, drawn without replacement from softmax(scores / temperature), of a stream of documents.
 *
 *   key_i = scores_i / temperature + Gumbel(id_i, seed), or scores_i where temperature is 0; the k largest are kept
 *
 * What is kept between calls is the caller's: `held` entries of keys and picks, and a threshold; it starts as held = 0,
 * threshold = -infinity. The result is the same for any order and any sharding of the documents. A call on a card
 * that finds no room does nothing and says so in `fault`; on the CPU it is refused.
 */
enum { GHOSTGRAM_GUMBEL_SPARE = 512 };

typedef struct {          /* every call begins by writing this */
  int64_t nan_at;         /* the first position of a NaN in scores, which is not drawn; -1: none */
  int64_t two_scores;     /* 1: one id came with two scores, both among the best, and this is the smallest such id: */
  uint64_t two_scores_id; /* set only where `finish` */
  int64_t no_room;        /* 1: nothing was done; on a card alone */
} ghostgram_gumbel_fault;

typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype; /* of scores: floating */
  int32_t by_position;   /* 1: picks are positions in scores (held must be 0), else ids */
  int32_t finish;        /* 1: leave the best k alone, best first */
  int32_t reserved;      /* 0 */
  int64_t count, k;
  uint64_t seed;
  double temperature;  /* 0, or from 1e-300 to 1e300 */
  const void *scores;  /* (count), contiguous like all arrays here */
  const uint64_t *ids; /* (count); null: 0, 1, ... */
  int64_t capacity;    /* >= k + GHOSTGRAM_GUMBEL_SPARE, unless all documents fit in any case */
  double *keys;        /* (capacity) */
  int64_t *picks;      /* (capacity) the bits of ids */
  int64_t *held;       /* these three are wanted always */
  double *threshold;
  ghostgram_gumbel_fault *fault;
} ghostgram_gumbel_topk_args;

GHOSTGRAM_API ghostgram_status ghostgram_gumbel_topk(const ghostgram_gumbel_topk_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_gumbel_topk_cuda_workspace(const ghostgram_gumbel_topk_args *args,
                                                                    size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_gumbel_topk_cuda(const ghostgram_gumbel_topk_args *args, void *workspace,
                                                          size_t workspace_bytes, void *stream);

/* ---- grad_project -----------------------------------------------------------------------------------------------
 *
 * Random projections of the per-sample gradients of a linear layer.
 *
 *   RADEMACHER, GAUSSIAN: out_i = P_out G_i P_in^T (k_out, k_in)    SPARSE: out_i = a count sketch of G_i (buckets)
 */
typedef int32_t ghostgram_project_kind;
enum { GHOSTGRAM_RADEMACHER = 1, GHOSTGRAM_GAUSSIAN = 2, GHOSTGRAM_SPARSE = 3 };

typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype; /* of a and b: floating */
  ghostgram_project_kind kind;
  uint64_t seed;
  uint32_t layer;                /* tells layers of one model apart, so that their sketches can be added */
  int32_t reserved;              /* 0 */
  int64_t samples, tokens, d, p; /* B, T, d, p */
  const void *a;                 /* (B, T, d) */
  int64_t a_sample, a_token;
  const void *b; /* (B, T, p) */
  int64_t b_sample, b_token;
  int64_t k_out, k_in;      /* unless SPARSE */
  const void *P_out, *P_in; /* (k_out, p), (k_in, d); null: drawn from the seed */
  int64_t P_out_row, P_in_row;
  ghostgram_dtype P_out_dtype, P_in_dtype; /* that of a, or of the sums */
  int64_t buckets, nonzeros;               /* where SPARSE: 1 <= nonzeros <= buckets < 2^31 */
  void *out; /* (B, k_out, k_in) or (B, buckets), in the dtype of the sums; always wanted */
} ghostgram_grad_project_args;

GHOSTGRAM_API ghostgram_status ghostgram_grad_project(const ghostgram_grad_project_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_grad_project_cuda_workspace(const ghostgram_grad_project_args *args,
                                                                     size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_grad_project_cuda(const ghostgram_grad_project_args *args, void *workspace,
                                                           size_t workspace_bytes, void *stream); /* not float64 */

/* ---- softmax_stats ----------------------------------------------------------------------------------------------
 *
 * How hard each row of logits finds its label, from one read of the logits.
 *
 *   p = softmax(z)    loss = -sum_c q_c log p_c    el2n = ||p - q||_2    entropy = -sum_c p_c log p_c
 */
typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype;       /* of logits: floating */
  ghostgram_dtype label_dtype; /* INT32, INT64: class numbers; that of the logits or of the sums: distributions q */
  int32_t has_ignore_index;    /* 1: rows whose class number is ignore_index give 0 */
  int32_t reserved;            /* 0 */
  int64_t ignore_index;
  int64_t samples, tokens, classes; /* B, T, C */
  const void *logits;               /* (B, T, C) */
  int64_t logit_sample, logit_token;
  const void *labels; /* (B, T), or (B, T, C) where they are distributions */
  int64_t label_sample, label_token;
  void *loss, *el2n, *entropy, *max_probability; /* (B, T) in the dtype of the sums */
  int64_t *bad_row; /* always wanted: the first row i T + t whose class number is outside [0, C), which is left alone;
                       -1 if there is none */
} ghostgram_softmax_stats_args;

GHOSTGRAM_API ghostgram_status ghostgram_softmax_stats(const ghostgram_softmax_stats_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_softmax_stats_cuda_workspace(const ghostgram_softmax_stats_args *args,
                                                                      size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_softmax_stats_cuda(const ghostgram_softmax_stats_args *args, void *workspace,
                                                            size_t workspace_bytes, void *stream);

/* ---- trajectory_match -------------------------------------------------------------------------------------------
 *
 * How far parameters are from a target's, in units of where they started.
 *
 *   num = sum_j m_j (student_j - target_j)^2    D = sum_j m_j (start_j - target_j)^2    S = sum_j m_j start_j^2
 *   loss = num / D                              gradient_j = 2 g m_j (student_j - target_j) / D
 *
 * j runs over the scalars of all tensors, each contiguous. m_j is 0 for the first `first` scalars, else the product of
 * its tensor's weight and its mask. With `measure` loss and totals are written; without, D is read from the totals of
 * an earlier call. Gradients are written only where totals are usable: wrong == 0 and not D <= 1e-12 S.
 */
typedef struct {
  int64_t size;
  double weight; /* 1 for a plain loss; 0 leaves the tensor out */
  const void *student;
  const void *start;  /* read where `measure` */
  const void *target; /* null: 0, which goes without `measure` alone */
  const void *mask;   /* null: 1; for all tensors or for none */
  void *gradient;     /* written where `gradient` */
} ghostgram_trajectory_tensor;

typedef struct {
  double num, D, S;
  double wrong; /* how many weights are not >= 0, NaN among them */
} ghostgram_trajectory_totals;

typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype;      /* of student, start and target: floating */
  ghostgram_dtype mask_dtype; /* BOOL, or that of the loss; read where there are masks */
  int32_t measure;            /* 1: loss and totals are wanted */
  int32_t gradient; /* 1: gradients are wanted: in the dtype of the loss with `measure`, of the tensors without */
  int64_t first;
  const void *loss_gradient;                  /* g, a scalar of the dtype of the loss; null: 1 */
  const ghostgram_trajectory_tensor *tensors; /* a table in host memory, read before the call returns */
  int64_t count;
  void *loss;                          /* a scalar: float32, or float64 where the tensors are; wanted with `measure` */
  ghostgram_trajectory_totals *totals; /* always wanted */
} ghostgram_trajectory_match_args;

GHOSTGRAM_API ghostgram_status ghostgram_trajectory_match(const ghostgram_trajectory_match_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_trajectory_match_cuda_workspace(const ghostgram_trajectory_match_args *args,
                                                                         size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_trajectory_match_cuda(const ghostgram_trajectory_match_args *args,
                                                               void *workspace, size_t workspace_bytes, void *stream);

/* ---- adam_dots --------------------------------------------------------------------------------------------------
 *
 * What losses would change by, to first order, if AdamW stepped on one sample alone.
 *
 *   out_ir = <D_r, step(clip_i G_i) - step(0)>
 *   step(g) = -eta (m' / bc1) / (sqrt(v' / bc2) + eps),  m' = beta1 m + (1 - beta1) g,  v' = beta2 v + (1 - beta2) g^2
 */
typedef struct {
  size_t struct_size;
  ghostgram_dtype dtype;                     /* of a and b: floating */
  ghostgram_dtype moment_dtype;              /* of m and v: that, or that of the sums */
  ghostgram_dtype direction_dtype;           /* of D: the same */
  int32_t reserved;                          /* 0 */
  int64_t samples, tokens, d, p, directions; /* B, T, d, p, R */
  const void *a;                             /* (B, T, d) */
  int64_t a_sample, a_token;
  const void *b; /* (B, T, p) */
  int64_t b_sample, b_token;
  const void *clip;  /* (B) in the dtype of the sums, contiguous */
  const void *m, *v; /* (p, d) AdamW's moments, v >= 0 */
  int64_t m_row, v_row;
  const void *D; /* (R, p, d) */
  int64_t D_direction, D_row;
  double eta, beta1, beta2, eps; /* 0 <= beta < 1, 0 < eps <= 1 */
  double bc1, bc2;               /* 1 - beta1^n, 1 - beta2^n where the step would be the n-th: in (0, 1] */
  void *out;                     /* (B, R) in the dtype of the sums; always wanted */
} ghostgram_adam_dots_args;

GHOSTGRAM_API ghostgram_status ghostgram_adam_dots(const ghostgram_adam_dots_args *args);
GHOSTGRAM_API ghostgram_status ghostgram_adam_dots_cuda_workspace(const ghostgram_adam_dots_args *args, size_t *bytes);
GHOSTGRAM_API ghostgram_status ghostgram_adam_dots_cuda(const ghostgram_adam_dots_args *args, void *workspace,
                                                        size_t workspace_bytes, void *stream); /* not float64 */

#ifdef __cplusplus
}
#endif

#endif
