/* Which samples of a batch moved a linear layer most, and which of them helped a held-out loss?
 *
 * The layer maps d = 8 features to p = 4; the batch has 5 samples of 3 tokens. Training computes the sum of the
 * samples' gradients; the same pass gives each sample's norm, and its inner product with the gradient of a held-out
 * loss: the larger, the more a step of gradient descent on that sample alone would lower that loss. No per-sample
 * gradient is ever stored. */
#include <ghostgram/ghostgram.h>

#include <math.h>
#include <stdio.h>

enum { samples = 5, tokens = 3, d = 8, p = 4 };

/* What the layer saw (inputs) and what came back to it (gradients of its outputs); a waveform stands in for both. */
static void wave(float *x, int n, double step) {
  for (int i = 0; i < n; ++i)
    x[i] = (float)sin(step * (i + 1));
}

int main(void) {
  float inputs[samples][tokens][d], gradients[samples][tokens][p], held_out[p][d];
  float weight_grad[p][d], norms2[samples], dots[samples];
  wave(&inputs[0][0][0], samples * tokens * d, 0.7);
  wave(&gradients[0][0][0], samples * tokens * p, 1.3);
  wave(&held_out[0][0], p * d, 0.4);

  ghostgram_grad_stats_args args = {.struct_size = sizeof args}; /* all else is 0 */
  args.dtype = args.direction_dtype = GHOSTGRAM_FLOAT32;
  args.samples = samples, args.tokens = tokens, args.d = d, args.p = p, args.directions = 1;
  args.a = inputs, args.a_sample = tokens * d, args.a_token = d; /* strides count elements */
  args.b = gradients, args.b_sample = tokens * p, args.b_token = p;
  args.D = held_out, args.D_direction = p * d, args.D_row = d;
  args.weight_grad = weight_grad, args.weight_grad_row = d;
  args.norms2 = norms2;
  args.dots = dots;
  if (ghostgram_grad_stats(&args) != GHOSTGRAM_OK) {
    fprintf(stderr, "%s\n", ghostgram_last_error());
    return 1;
  }

  printf("sample  norm of its gradient  what it does for the held-out loss\n");
  for (int i = 0; i < samples; ++i)
    printf("%6d  %20.6f  %34.6f\n", i, sqrt(norms2[i]), dots[i]);
  printf("weight_grad[0][0] = %.6f\n", weight_grad[0][0]);

  args.weight_grad_row = d - 1; /* a mistake: its rows would overlap */
  if (ghostgram_grad_stats(&args) != GHOSTGRAM_OK)
    printf("refused: %s\n", ghostgram_last_error());
  return 0;
}
