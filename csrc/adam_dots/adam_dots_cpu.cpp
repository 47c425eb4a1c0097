// adam_dots on the CPU: tiles of each sample's gradient as the weight-gradient GEMM makes them; each becomes, in L1,
// what AdamW's step would change by, and is dotted with the same tile of every direction. What bounds it: the FMA
// units, and for short samples the step's roots and divisions. See docs/ops/adam_dots.md.
#include "adam_dots/adam_dots.h"
#include "core/adam_step.h"
#include "core/gradient_tiles.h"

namespace gg::GG_ISA {
namespace {

// Scratch of a block: r0, pull and every direction. Sums of a sample: one for every direction.
template <class In, class Acc> class Kernel : public GradientTiles<Kernel<In, Acc>, AdamDots, In, Acc> {
  using Tiles = GradientTiles<Kernel, AdamDots, In, Acc>;
  using Tiles::s;
  static constexpr int64_t root = 0, pull = Block<Acc>::size, directions = 2 * pull;

public:
  explicit Kernel(const AdamDots &args)
      : Tiles(args, 2 + args.directions, args.directions),
        constants(args.eta, args.beta1, args.beta2, args.eps, args.bc1, args.bc2) {}

  void run() {
    this->walk();
    for (int64_t i = 0; i < s.samples; ++i)
      for (int64_t r = 0; r < s.directions; ++r)
        static_cast<Acc *>(s.out)[i * s.directions + r] = static_cast<Acc>(constants.unit * this->sum(i, r));
  }

  void open_block(const Block<Acc> &block, bool, Acc *scratch) const {
    this->load_block(block, s.m, s.m_row, s.moment_dtype, scratch + pull);
    this->load_block(block, s.v, s.v_row, s.moment_dtype, scratch + root);
    this->for_each_tile(block, [&](int64_t, int64_t, int64_t place) {
      for (Acc *at = scratch + place, *end = at + block.at(block.rows); at < end; at += lanes<Acc>) {
        const StepState<Acc> state = step_state<Acc>(constants, load(at + pull), load(at + root));
        store(at + root, state.root), store(at + pull, state.pull);
      }
    });
    for (int64_t r = 0; r < s.directions; ++r) {
      const auto *D = static_cast<const char *>(s.D) + r * s.D_direction * size_of(s.direction_dtype);
      this->load_block(block, D, s.D_row, s.direction_dtype, scratch + directions + r * Block<Acc>::size);
    }
  }

  void close_block(const Block<Acc> &, Acc *) const {}

  // Changes are made and summed in what exists of a tile, so that a bias costs no rows that it has not.
  inline void finish_tile(const Tile<Acc> &acc, Acc *tile, int64_t rows, int64_t cols, int64_t i,
                          vec<double> *sums) const {
    Tile<Acc> changes;
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v)
        changes[r][v] = acc[r][v];
    rows = least(rows, tile_rows);
    cols > lanes<Acc> ? use_tile<tile_vectors>(changes, tile, rows, i, sums)
                      : use_tile<1>(changes, tile, rows, i, sums);
  }

private:
  template <int vectors>
  void use_tile(Tile<Acc> &changes, const Acc *tile, int64_t rows, int64_t i, vec<double> *sums) const {
    const Acc scale = static_cast<const Acc *>(s.clip)[i] * constants.scale;
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Acc *at = tile + Block<Acc>::at(r) + v * lanes<Acc>;
        const StepState<Acc> state{load(at + root), load(at + pull)};
        changes[r][v] = step_change<Acc>(constants.eps, state, scale * changes[r][v]);
      }
    for (int64_t k = 0; k < s.directions; ++k) {
      const Acc *D = tile + directions + k * Block<Acc>::size;
      vec<Acc> dot[tile_vectors] = {};
      for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
          dot[v] += changes[r][v] * load(D + Block<Acc>::at(r) + v * lanes<Acc>);
      this->add_tile_row(sums[k], dot);
    }
  }

  const StepConstants<Acc> constants;
};

} // namespace

void adam_dots(const AdamDots &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
