// StaticSizes: static mode. From the counts that every rank of a node sees it derives which rows each mate has room
// for, so that a forwarder knows without a message what its mates lost: of the plan alone, whatever arrives when (I3).
#pragma once

#include <cstdint>
#include <vector>

#include "proto/region.h"

namespace moe_efa::kernels::cpu {

class StaticSizes {
 public:
  explicit StaticSizes(const proto::NodeView& view);

  // What the announcements say: of each mate its output, of each source the rows per expert of this node.
  void set_output(std::uint32_t mate, std::uint32_t capacity, std::uint32_t expert_alignment);
  void set_counts(std::uint32_t source_rank, const std::uint32_t* counts);
  void finish();  // once all are in

  bool any_lost() const;
  // What the mate would have needed, in rows.
  std::uint64_t required(std::uint32_t mate) const { return static_cast<std::uint64_t>(outputs_[mate].required); }
  // How many rows of source (source_node, own local rank) the rank of an expert of this node has room for, at most
  // 2^31; those of lower indices.
  std::uint32_t room(std::uint32_t source_node, std::uint32_t expert) const;
  // Of a row of source (source_node, own local rank) for an expert of this node: 0 if the expert's rank has room for
  // it, otherwise the capacity that it needed.
  std::uint64_t overflow(std::uint32_t source_node, std::uint32_t expert, std::uint32_t index) const;

 private:
  struct Output {
    std::uint32_t alignment = 1;
    std::int64_t usable = 0, required = 0;  // rows
  };

  proto::Topology topology_;
  std::uint32_t experts_per_rank_, experts_per_node_;
  std::vector<Output> outputs_;        // [mate]
  std::vector<std::uint32_t> counts_;  // [source rank][expert of the node]
  std::vector<std::int64_t> bases_;    // [source node][expert of the node]: first row of a source on the own rail
};

}  // namespace moe_efa::kernels::cpu
