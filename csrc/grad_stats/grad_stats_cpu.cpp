// grad_stats on the CPU: the weight-gradient GEMM, tile by tile and sample by sample, so that each sample's tile is in
// registers when its norm and dots are taken. What bounds it: the FMA units. See docs/ops/grad_stats.md.
#include "core/gradient_tiles.h"
#include "grad_stats/grad_stats.h"

namespace gg::GG_ISA {
namespace {

// Scratch of a block: dW, and every direction. Sums of a sample: its squares, and its products with every direction.
template <class In, class Acc> class Kernel : public GradientTiles<Kernel<In, Acc>, GradStats, In, Acc> {
  using Tiles = GradientTiles<Kernel, GradStats, In, Acc>;
  using Tiles::s;

public:
  explicit Kernel(const GradStats &args) : Tiles(args, 1 + args.directions, 1 + args.directions) {}

  void run() {
    this->walk();
    for (int64_t i = 0; i < s.samples; ++i) {
      if (s.norms2)
        static_cast<Acc *>(s.norms2)[i] = static_cast<Acc>(this->sum(i, 0));
      for (int64_t k = 0; k < s.directions; ++k)
        static_cast<Acc *>(s.dots)[i * s.directions + k] = static_cast<Acc>(this->sum(i, 1 + k));
    }
  }

  void open_block(const Block<Acc> &block, bool continued, Acc *scratch) const {
    for (int64_t k = 0; k < s.directions; ++k) {
      const auto *D = static_cast<const char *>(s.D) + k * s.D_direction * size_of(s.direction_dtype);
      this->load_block(block, D, s.D_row, s.direction_dtype, scratch + (1 + k) * Block<Acc>::size);
    }
    std::memset(scratch, 0, sizeof(Acc) * Block<Acc>::size);
    if (continued || s.accumulate)
      for_each_row(block, scratch, [](Acc *whole, Acc *tile, int64_t cols) { copy_padded(whole, tile, cols, cols); });
  }

  void close_block(const Block<Acc> &block, Acc *scratch) const {
    for_each_row(block, scratch, [](Acc *whole, Acc *tile, int64_t cols) { copy_padded(tile, whole, cols, cols); });
  }

  // A sample's finished tile of G: added to dW, squared, and dotted with the same tile of every direction.
  inline void finish_tile(const Tile<Acc> &acc, Acc *tile, int64_t, int64_t, int64_t, vec<double> *sums) const {
    vec<Acc> squares[tile_vectors] = {};
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) {
        Acc *w = tile + Block<Acc>::at(r) + v * lanes<Acc>;
        store(w, load(w) + acc[r][v]);
        squares[v] += acc[r][v] * acc[r][v];
      }
    this->add_tile_row(sums[0], squares);
    for (int64_t k = 1; k <= s.directions; ++k) {
      const Acc *D = tile + k * Block<Acc>::size;
      vec<Acc> dot[tile_vectors] = {};
#pragma GCC unroll 16
      for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v)
          dot[v] += acc[r][v] * load(D + Block<Acc>::at(r) + v * lanes<Acc>);
      this->add_tile_row(sums[k], dot);
    }
  }

private:
  // visit(in dW, in scratch, columns) for every row of every tile of a block, if dW is wanted.
  template <class Visit> void for_each_row(const Block<Acc> &block, Acc *scratch, Visit &&visit) const {
    Acc *whole = static_cast<Acc *>(s.weight_grad) + block.row * s.weight_grad_row + block.col;
    for (int64_t r = 0; s.weight_grad && r < block.rows; ++r)
      this->for_each_tile(block, [&](int64_t col, int64_t cols, int64_t place) {
        visit(whole + r * s.weight_grad_row + col, scratch + place + block.at(r), cols);
      });
  }
};

} // namespace

void grad_stats(const GradStats &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
