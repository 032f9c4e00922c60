// What one step does in one layer: its jobs and tiles, made from the tables once and run whenever the step comes again, and
// where they find their scratch memory.
#pragma once

#include <omp.h>

#include "jobs.h"

namespace smoa {

template <typename E>
struct Call {
  using S = Scheme<E>;
  const Layer<E>& layer;
  const Step& step;
  const Slice<E>* slices;
  int64_t h_in;
  bool whole;  // the output is written, base product included
  Tensors<E> tensors;
  std::vector<Job<E>> jobs;
  std::vector<Row> sources;
  std::vector<Pairing> pairings;
  std::vector<Tile<E>> tiles;
  std::vector<Output> outputs;
  std::vector<Batch> source_batches, output_batches;
  int64_t sorted_bytes = 0, mixed_bytes = 0, panel_bytes = 0, factor_bytes = 0;
  char* thread_space = nullptr;

  Call(const Layer<E>& layer, const Step& step, bool whole)
      : layer(layer), step(step), slices(layer.slices), h_in(layer.h_in), whole(whole) {
    std::vector<int32_t> job_of(layer.num_partitions, -1);
    for (int64_t slice = 0; slice < layer.num_slices; ++slice) {
      if (whole) job(slice, slices[slice].whole, job_of);
      for (int64_t g = 0; g < step.num_groups; ++g) add_group(slice, step.groups[g], job_of);
    }
    for (size_t j = 0; j < jobs.size(); ++j) add_rows(static_cast<int32_t>(j));
    source_batches = batches(sources);
    output_batches = batches(outputs);
    for (int most = sweeping() ? 1 : kMaxPanels<E>; most > 0; most /= 2) {
      tiles.clear();
      for (size_t j = 0; j < jobs.size(); ++j) add_tiles(static_cast<int32_t>(j), most);
      if (static_cast<int>(tiles.size()) >= 2 * omp_get_max_threads()) break;
    }
  }

  // Whether panels are swept one by one: for so few tokens that reading W is what takes the time.
  bool sweeping() const { return whole && Amx<E>::kUsed && step.num_tokens <= kAmxRows; }

  static int64_t steps(int64_t rank) { return (rank + S::kRanks - 1) / S::kRanks; }
  const E* factor_a(int64_t slice, int64_t slot) const { return slices[slice].a + slot * layer.max_rank * h_in; }
  const E* factor_b(int64_t slice, int64_t slot) const {
    return slices[slice].b + slot * layer.max_rank * slices[slice].h_out;
  }

  // The job of a partition, which is made at need.
  int32_t job(int64_t slice, int64_t partition, std::vector<int32_t>& job_of) {
    int32_t& index = job_of[partition];
    if (index < 0) {
      index = static_cast<int32_t>(jobs.size());
      jobs.emplace_back();
      Job<E>& made = jobs.back();
      made.slice = slice;
      made.partition = &layer.partitions[partition];
      made.gridded = whole && Amx<E>::kUsed;
      for (int64_t k = 0; k < made.partition->num_blocks; ++k) {
        const int64_t width = made.width(made.partition->blocks[k]);
        made.first_column.push_back(made.columns);
        made.columns += width;
        made.widest = std::max(made.widest, width);
      }
    }
    return index;
  }

  void add_group(int64_t slice, const Group& group, std::vector<int32_t>& job_of) {
    const Entry<E>& entry = layer.entries[slice * layer.num_slots + group.slot];
    if (entry.partition < 0 || (entry.rank == 0 && !entry.resident)) return;
    const int32_t index = job(slice, entry.partition, job_of);
    Job<E>& job = jobs[index];
    const int64_t count = group.end - group.start;
    const int32_t* tokens = step.token_order + group.start;
    const Way way = choose_way(step, static_cast<double>(count), entry);
    if (way != Way::kExpand) {
      job.groups.push_back({group.slot, entry.rank, job.alone_tokens, count, tokens,
                            way == Way::kResident ? entry.resident : nullptr, nullptr});
      job.alone_tokens += count;
      return;
    }
    const E* b = factor_b(slice, group.slot);
    for (int64_t t = 0; t < count; ++t) {
      const auto position = static_cast<int32_t>(job.expand_tokens.size());
      sources.push_back({index, static_cast<int32_t>(group.slot), static_cast<int32_t>(entry.rank), tokens[t], position,
                         static_cast<int64_t>(job.expanded.size())});
      job.expand_tokens.push_back(tokens[t]);
      if (position % kTokenChunk == 0)
        job.chunks.push_back({static_cast<int64_t>(job.expanded.size()), 0, position, 0});
      for (int64_t rho = 0; rho < entry.rank; ++rho) job.expanded.push_back({b + rho * slices[slice].h_out, position});
      job.chunks.back().num_rows += entry.rank;
      ++job.chunks.back().num_tokens;
    }
  }

  // Where the tokens that do not expand stand: after those that do, whose number is only known now.
  void add_rows(int32_t j) {
    Job<E>& job = jobs[j];
    std::vector<char> placed(whole ? step.num_tokens : 0);
    const auto place = [&](int64_t position, int32_t token) {
      outputs.push_back({j, static_cast<int32_t>(position), token});
      if (whole) placed[token] = 1;
    };
    for (int64_t i = 0; i < job.num_expanding(); ++i) place(i, job.expand_tokens[i]);
    for (size_t g = 0; g < job.groups.size(); ++g) {
      AloneGroup<E>& group = job.groups[g];
      group.first_token += job.num_expanding();
      if (!group.resident) pairings.push_back({j, static_cast<int32_t>(g)});
      for (int64_t t = 0; t < group.num_tokens; ++t) {
        add_plain(j, group.tokens[t], group.first_token + t);
        place(group.first_token + t, group.tokens[t]);
      }
    }
    for (size_t token = 0; token < placed.size(); ++token)
      if (!placed[token]) job.bare.push_back(static_cast<int32_t>(token));
    for (size_t i = 0; i < job.bare.size(); ++i) {
      add_plain(j, job.bare[i], job.first_bare() + static_cast<int64_t>(i));
      place(job.first_bare() + static_cast<int64_t>(i), job.bare[i]);
    }
    job.first_plain = whole ? 0 : job.num_expanding();
  }

  void add_plain(int32_t j, int32_t token, int64_t position) {
    sources.push_back({j, 0, 0, token, static_cast<int32_t>(position), 0});
  }

  // Four by four where so many follow each other in a job, the others one by one.
  template <typename Item>
  static std::vector<Batch> batches(const std::vector<Item>& items) {
    std::vector<Batch> found;
    for (size_t i = 0; i < items.size(); i += found.back().count) {
      int alike = 1;
      while (alike < kFour && i + alike < items.size() && items[i + alike].job == items[i].job) ++alike;
      found.push_back({i, kTakesFours<E> && alike == kFour ? kFour : 1});
    }
    return found;
  }

  // Each block in groups of at most `most` panels, of nearly equal size.
  void add_tiles(int32_t j, int64_t most) {
    const Partition<E>& part = *jobs[j].partition;
    for (int64_t k = 0; k < (whole ? part.num_bands : part.num_blocks); ++k) {
      const Block& block = part.blocks[k];
      const int64_t formed = block.packed_cols * kLanes, parts = (block.panels() + most - 1) / most;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t first = block.panels() * i / parts, end = block.panels() * (i + 1) / parts;
        const int64_t row = block.row_start + first * kLanes;
        const int64_t panels_size = (end - first) * formed * static_cast<int64_t>(sizeof(typename S::Formed));
        if (!jobs[j].groups.empty() && panels_size > panel_bytes) panel_bytes = panels_size;
        tiles.push_back({j, static_cast<int32_t>(end - first), &block,
                         part.weights + block.weight + first * block.stride, first, row, block.rows - first * kLanes});
      }
    }
  }

  // Rows behind the last that a tile reads, and whose products nobody does.
  static constexpr int64_t kSpare = Amx<E>::kUsed ? kAmxRows - 1 : 0;

  // Lays out the scratch memory from `base`; returns its size in bytes.
  int64_t place(char* base) {
    constexpr int64_t kSize = sizeof(E);
    char* next = base;
    const auto take = [&next](int64_t bytes) {
      char* start = next;
      next += (bytes + 63) & ~int64_t{63};
      return start;
    };
    for (Job<E>& job : jobs) {
      const Partition<E>& part = *job.partition;
      const int64_t h_out = slices[job.slice].h_out;
      sorted_bytes = std::max(sorted_bytes, (kSize * part.packed_cols + 63) & ~int64_t{63});
      mixed_bytes = std::max(mixed_bytes, kSize * kFour * ((std::max(h_in, h_out) + 31) & ~int64_t{31}));
      constexpr auto kRowSize = static_cast<int64_t>(sizeof(typename S::Row));
      job.result_stride = (h_out + 31) & ~int64_t{31};
      job.result = reinterpret_cast<E*>(take(job.num_tokens() * job.result_stride * kSize));
      const auto expanded = static_cast<int64_t>(job.expanded.size());
      job.rows = reinterpret_cast<typename S::Row*>(take((expanded * job.columns + kSpare * job.widest) * kRowSize));
      job.plain_stride = ((part.packed_cols + 31) & ~int64_t{31}) | 32;  // an odd number of lines, as the ways of a cache
      const int64_t plain = job.num_tokens() - job.first_plain;
      job.plain = reinterpret_cast<typename S::Row*>(take((plain + kSpare) * job.plain_stride * kRowSize));
      job.bias = tensors.bias ? reinterpret_cast<float*>(take(h_out * static_cast<int64_t>(sizeof(float)))) : nullptr;
      for (AloneGroup<E>& group : job.groups)
        if (!group.resident)
          group.a = reinterpret_cast<typename S::Factor*>(take(steps(group.rank) * part.packed_cols * 4));
    }
    panel_bytes = (panel_bytes + 63) & ~int64_t{63};
    factor_bytes = steps(layer.max_rank) * kMaxPanels<E> * static_cast<int64_t>(sizeof(typename S::Operand));
    thread_space = take(omp_get_max_threads() * thread_bytes());
    return next - base;
  }

  int64_t thread_bytes() const { return kFour * sorted_bytes + mixed_bytes + panel_bytes + factor_bytes; }

  Workspace<E> workspace(int thread) const {
    char* space = thread_space + thread * thread_bytes();
    const auto sorted = [&](int k) { return reinterpret_cast<E*>(space + k * sorted_bytes); };
    char* mixed = space + kFour * sorted_bytes;
    char* panels = mixed + mixed_bytes;
    return {{}, {sorted(0), sorted(1), sorted(2), sorted(3)}, reinterpret_cast<E*>(mixed),
            reinterpret_cast<typename S::Formed*>(panels),
            reinterpret_cast<typename S::Operand*>(panels + panel_bytes)};
  }
};

}  // namespace smoa
