"""CUDA C++ of the four large products on Hopper: one persistent, warp-specialised kernel.

A block owns one tile of up to ``NC`` units of 64 rows of one expert and one block of ``NT`` columns
at a time. One warpgroup loads (TMA; gathered rows by asynchronous copies) into a ring of shared
memory; ``NC`` warpgroups multiply one unit each by the same weight tile, so that a byte of weights
from L2 serves 192 rows. LoRA is one more step of the inner loop, its ranks padded with zeros by
TMA. An expert's rows are cut into tiles of nearly equal size. Tiles are handed out by a counter:
who computes a tile changes no bit of it.
"""

from __future__ import annotations

UNITS = 3  # of 64 rows, which a block multiplies at a time


def source(constants: dict[str, int]) -> str:
    """The kernel's source for one set of constants (see `experts_products_cuda._launch`)."""
    lines = [f"#define {name} {value}" for name, value in (*constants.items(), ("UNITS", UNITS))]
    n, transposed = constants["NT"], constants["KN"]
    products = _mma("mma_left", n, 128, 0, transposed)
    products += _mma("mma_right", n, n - 128, 64, transposed)
    return "\n".join(lines) + _COMMON + products + _KERNEL


def _mma(name: str, all_columns: int, n: int, first: int, transposed: int) -> str:
    """D (64, n) = or += A (64, 16) B (16, n), both from shared memory; ``first`` register of d."""
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{first + i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{all_columns // 2}], u64 a, u64 b, int keep) {{
  asm volatile(
      "{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0;"
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{registers}}},"
      "%{count}, %{count + 1}, p, 1, 1, 0, {transposed}; }}"
      : {outputs} : "l"(a), "l"(b), "r"(keep));
}}
"""


_COMMON = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct __align__(64) Map { char bytes[128]; };

constexpr int NC = UNITS;  // warpgroups that multiply, 64 rows each
constexpr int BN = EPI >= 2 ? NT / 2 : NT;  // output columns of a tile (of gate, and as many of up)
constexpr int ROWS = 64 * NC * CL;  // of a tile: CL blocks of a cluster share it and its weights
constexpr int STEPS = (KDIM + 63) / 64;
constexpr int ALL_STEPS = STEPS + (RP ? 1 : 0);
constexpr int BOXES = (NT + 63) / 64;  // of 64 columns
constexpr bool BOXED = KN || CL > 1;  // how weights come; else all columns at once
constexpr u32 A_BYTES = 64 * NC * 128;
constexpr u32 B_BYTES = BOXED ? BOXES * 8192 : NT * 128;
constexpr u32 STAGE = A_BYTES + B_BYTES;
constexpr bool WIDE = !(GATHER && NT < 256);  // consumers need 160 registers
constexpr bool SHARED_TOKENS = GATHER && WIDE;  // and leave loaders 32

__device__ __forceinline__ u32 shared_of(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void bar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void bar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void bar_wait(u32 bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar), "r"(phase) : "memory");
}
__device__ __forceinline__ void load_box(u32 to, const Map* map, u32 bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
}
// The weights: to this block, or to the same place in all blocks of the cluster.
__device__ __forceinline__ void load_box(u32 to, const Map* map, u32 bar, int x, int y, int z) {
  if (CL == 1)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(map), "r"(bar),
        "r"(x), "r"(y), "r"(z), "h"((u16)((1 << CL) - 1)) : "memory");
}
// Which block of its cluster this is; read where needed rather than kept in a register.
__device__ __forceinline__ int cluster_rank() {
  u32 rank = 0;
  if (CL > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// The address of the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ u32 remote(u32 at, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
__device__ __forceinline__ void bar_arrive_remote(u32 bar) {
  // No release at cluster scope: that is a fence of the whole GPU in every step, and nothing was
  // written that another block would read.
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void send(u32 to, int value, u32 bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(to), "r"(value), "r"(bar) : "memory");
}
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void copy16(u32 to, const u16* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copies_arrive(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// 128-byte swizzle. K fastest: 8-row groups of 1024 bytes. Columns fastest: boxes of 64 columns.
__device__ __forceinline__ u64 matrix(u32 at, u32 leading, u32 stride) {
  return (u64)((at & 0x3FFFF) >> 4) | ((u64)(leading >> 4) << 16) | ((u64)(stride >> 4) << 32) |
         ((u64)1 << 62);
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
// Four lanes hold two columns of each of four chunks of eight; afterwards each holds one chunk.
__device__ __forceinline__ uint4 transpose(u32 a, u32 b, u32 c, u32 d, bool odd, bool high) {
  u32 x = __shfl_xor_sync(~0u, odd ? a : b, 1), y = __shfl_xor_sync(~0u, odd ? c : d, 1);
  if (odd) { a = x; c = y; } else { b = x; d = y; }
  x = __shfl_xor_sync(~0u, high ? a : c, 2);
  y = __shfl_xor_sync(~0u, high ? b : d, 2);
  if (high) { a = x; b = y; } else { c = x; d = y; }
  return make_uint4(a, b, c, d);
}
__device__ __forceinline__ void store(u16* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w) : "memory");
}
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}
__device__ __forceinline__ float activate(float g) {
  if (EPI == 2) return g * sigmoid(g);
  return g * sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
}
"""

_KERNEL = r"""
struct Tile { int row, end, column, expert; };

// The tile numbered t; expert -1: none from here on. An expert's tiles follow each other, row tiles
// fastest in groups of GROUP, so that weights are read from memory once.
__device__ __forceinline__ Tile tile_of(int t, const int* tile_expert, const int* tile_row,
                                        const int* offsets, int first_block, int blocks) {
  const int m = t / blocks;
  Tile tile;
  tile.expert = tile_expert[m];
  if (tile.expert < 0) return tile;
  const int low = offsets[tile.expert], high = offsets[tile.expert + 1];
  const int units = (high - low + 63) / 64, parts = (high - low + ROWS - 1) / ROWS;
  int inside = t - (m - (tile_row[m] - low) / ROWS) * blocks;
  const int first = inside / (GROUP * blocks) * GROUP, size = min(parts - first, GROUP);
  inside -= first * blocks;
  const int part = first + inside % size, n = inside / size;
  int from = units * part / parts, to = units * (part + 1) / parts;
  const int all = to - from, rank = cluster_rank();
  to = from + (all * (rank + 1) + CL - 1) / CL;
  from += (all * rank + CL - 1) / CL;
  tile.row = low + from * 64;
  tile.end = min(high, low + to * 64);
  tile.column = (first_block + n) * BN;
  return tile;
}

struct Args {
  const u16* a; const int* order; const float* weights; u16* out; u16* h;
  const int* tile_expert; const int* tile_row; const int* offsets; int* counter;
  int tiles, first_block, blocks;
};

__device__ __forceinline__ void produce(const Args& p, const Map* ma, const Map* mw, const Map* ms,
                                        const Map* mv, u32 ring, u32 full, u32 empty, u32 mail,
                                        int4* infos, int* slots, volatile int* tokens,
                                        int thread) {
  const int total = p.tiles * p.blocks, lane = thread % 8, line = thread / 8;
  const int clusters = gridDim.x / CL;
  const u32 inside = line * 128 + ((lane ^ (line & 7)) << 4);
  int t = blockIdx.x / CL, s = 0, turn = 0;
  u32 phase = 1, letters = 0;
  for (;; turn ^= 1) {
    if (GATHER) {
      if (thread == 0) slots[turn] = t;
      asm volatile("bar.sync 1, 128;" ::: "memory");
      t = slots[turn];
    }
    Tile tile;
    tile.expert = -1;
    if (t < total)
      tile = tile_of(t, p.tile_expert, p.tile_row, p.offsets, p.first_block, p.blocks);
    if (tile.expert < 0) break;
    const int units = max(0, tile.end - tile.row + 63) / 64;
    int token[SHARED_TOKENS ? 1 : NC * 4];
    if (GATHER) {
#pragma unroll
      for (int i = 0; i < NC * 4; i++)
        (SHARED_TOKENS ? tokens[line + 16 * i] : token[i]) =
            p.order[max(0, min(tile.row + line + 16 * i, tile.end - 1))] / TOPK;
    }
    if (CL > 1 && thread == 0 && cluster_rank()) bar_expect(mail, 4);
#pragma unroll 1
    for (int step = 0; step < ALL_STEPS; step++) {
      const u32 a_at = ring + s * STAGE, b_at = a_at + A_BYTES, bar = full + 8 * s;
      const bool lora = RP && step == STEPS;
      bar_wait(empty + 8 * s, phase);
      if (thread == 0) {
        if (step == 0) infos[s] = make_int4(tile.row, tile.end, tile.column, tile.expert);
        const bool boxes = !GATHER || lora;
        const int k = lora ? 0 : step * 64;
        const Map* weight = lora ? mv : mw;
        bar_expect(bar, B_BYTES + (boxes ? units * 8192 : 0));
        if (BOXED) {
#pragma unroll 1
          for (int box = cluster_rank(); box < BOXES; box += CL) {
            const int n = tile.column + 64 * box;
            load_box(b_at + 8192 * box, weight, bar, KN ? n : k, KN ? k : n, tile.expert);
          }
        } else {
          load_box(b_at, weight, bar, k, tile.column, EPI >= 2 ? 2 * tile.expert : tile.expert);
        }
        if (boxes)
#pragma unroll 1
          for (int u = 0; u < units; u++)
            load_box(a_at + u * 8192, lora ? ms : ma, bar, k, tile.row + 64 * u);
        if (step == (ALL_STEPS > 6 ? ALL_STEPS - 6 : 0) && cluster_rank() == 0) {
          t = atomicAdd(p.counter, 1) + clusters;
#pragma unroll 1
          for (int other = 1; other < CL; other++)
            send(remote(shared_of(slots + 2 + turn), other), t, remote(mail, other));
        }
      }
      if (GATHER) {
        if (!lora) {
          const int k = step * 64 + lane * 8, bytes = KDIM % 64 == 0 || k < KDIM ? 16 : 0;
          const u16* from = p.a + (bytes ? k : 0);
#pragma unroll
          for (int i = 0; i < NC * 4; i++)
            if (i < units * 4)
              copy16(a_at + inside + i * 2048,
                     from + (u64)(SHARED_TOKENS ? tokens[line + 16 * i] : token[i]) * KDIM, bytes);
        }
        copies_arrive(bar);
      }
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    if (CL > 1 && thread == 0 && cluster_rank()) {
      bar_wait(mail, letters);
      letters ^= 1;
      t = *(volatile int*)(slots + 2 + turn);
    }
  }
  bar_wait(empty + 8 * s, phase);
  if (thread == 0) {
    infos[s] = make_int4(0, 0, 0, -1);
    bar_arrive(full + 8 * s);
    // The last block leaves the counter as the next launch wants it.
    if (cluster_rank() == 0) {
      __threadfence();
      if (atomicAdd(p.counter + 1, 1) == clusters - 1) { p.counter[0] = 0; p.counter[1] = 0; }
    }
  }
  if (GATHER) copies_arrive(full + 8 * s);
}

__device__ __forceinline__ void write(const float (&d)[NT / 2], const Args& p, int4 tile, int row,
                                      float scale_a, float scale_b) {
  const int q = threadIdx.x % 4;
  const bool odd = q & 1, high = q & 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + 8 * half;
    const bool live = r < tile.y;
    const float scale = half ? scale_b : scale_a;
#pragma unroll
    for (int g = 0; g < (BN / 8 + 3) / 4; g++) {
      u32 first[4], second[4], third[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int j = 4 * g + c;
        first[c] = second[c] = third[c] = 0;
        if (j < BN / 8) {
          float x = d[4 * j + 2 * half], y = d[4 * j + 2 * half + 1];
          if (EPI == 1) { x *= scale; y *= scale; }
          first[c] = pack(x, y);
          if (EPI >= 2) {
            float u = d[4 * (j + BN / 8) + 2 * half], v = d[4 * (j + BN / 8) + 2 * half + 1];
            second[c] = pack(u, v);
            third[c] = pack(activate(x) * u, activate(y) * v);
          }
        }
      }
      const int chunk = 4 * g + q, column = tile.z + 8 * chunk;
      const bool keep = live && (BN % 32 == 0 || chunk < BN / 8) && column < NDIM;
      uint4 value = transpose(first[0], first[1], first[2], first[3], odd, high);
      u16* at = p.out + (u64)r * STRIDE + (column - p.first_block * BN);
      if (keep) store(at, value);
      if (EPI >= 2) {
        value = transpose(second[0], second[1], second[2], second[3], odd, high);
        if (keep) store(at + NDIM, value);
        value = transpose(third[0], third[1], third[2], third[3], odd, high);
        if (keep) store(p.h + (u64)r * NDIM + column, value);
      }
    }
  }
}

__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// This warp has read stage s; the first lanes tell one block of the cluster each.
__device__ __forceinline__ void release(u32 empty, int s) {
  if (threadIdx.x % 32 >= CL) return;
  if (CL == 1) bar_arrive(empty + 8 * s);
  else bar_arrive_remote(empty + 8 * s);
}

template <int PARTS>
__device__ __forceinline__ void multiply(float (&d)[NT / 2], u32 a_at, u32 b_at, int keep) {
  if (GATHER) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < PARTS; k++) {
    const u64 a = matrix(a_at + 32 * k, 16, 1024);
    const u32 b = b_at + (KN ? 2048 : 32) * k;
    mma_left(d, a, matrix(b, KN ? 8192 : 16, 1024), keep | k);
    mma_right(d, a, matrix(b + 16384, KN ? 8192 : 16, 1024), keep | k);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void consume(const Args& p, u32 ring, u32 full, u32 empty,
                                        const int4* infos, int unit) {
  const int lane = threadIdx.x % 32, line = threadIdx.x % 128 / 32 * 16 + lane / 4;
  int s = 0;
  u32 phase = 0;
  for (;;) {
    bar_wait(full + 8 * s, phase);
    int4 tile = infos[s];
    tile.x = uniform(tile.x); tile.y = uniform(tile.y);
    tile.z = uniform(tile.z); tile.w = uniform(tile.w);
    if (tile.w < 0) return;
    if (unit * 64 < tile.y - tile.x) {
      const int row = tile.x + unit * 64 + line;
      float scale_a = 1.0f, scale_b = 1.0f;
      if (EPI == 1) {
        scale_a = p.weights[min(row, tile.y - 1)];
        scale_b = p.weights[min(row + 8, tile.y - 1)];
      }
      float d[NT / 2];
      int before = s;
      multiply<4>(d, ring + s * STAGE + unit * 8192, ring + s * STAGE + A_BYTES, 0);
      if (++s == STAGES) { s = 0; phase ^= 1; }
#pragma unroll 1
      for (int step = 1; step < STEPS; step++) {
        bar_wait(full + 8 * s, phase);
        multiply<4>(d, ring + s * STAGE + unit * 8192, ring + s * STAGE + A_BYTES, 1);
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release(empty, before);
        before = s;
        if (++s == STAGES) { s = 0; phase ^= 1; }
      }
      if (RP) {
        bar_wait(full + 8 * s, phase);
        multiply<RP / 16>(d, ring + s * STAGE + unit * 8192, ring + s * STAGE + A_BYTES, 1);
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        release(empty, before);
        before = s;
        if (++s == STAGES) { s = 0; phase ^= 1; }
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      release(empty, before);
#pragma unroll
      for (int i = 0; i < NT / 2; i++) asm volatile("" : "+f"(d[i])::"memory");
      write(d, p, tile, row, scale_a, scale_b);
    } else {
#pragma unroll 1
      for (int step = 0; step < ALL_STEPS; step++) {
        if (step) bar_wait(full + 8 * s, phase);
        __syncwarp();
        release(empty, s);
        if (++s == STAGES) { s = 0; phase ^= 1; }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(128 * (NC + 1), 1)
product(const __grid_constant__ Map ma, const __grid_constant__ Map mw,
        const __grid_constant__ Map ms, const __grid_constant__ Map mv,
        const __grid_constant__ Args p) {
  extern __shared__ char raw[];
  __shared__ __align__(16) int4 infos[STAGES];
  __shared__ __align__(8) u64 bars[2 * STAGES + 1];
  __shared__ int slots[4], tokens[SHARED_TOKENS ? 64 * NC : 1];
  const u32 ring = (shared_of(raw) + 1023) & ~1023u, full = shared_of(bars);
  const u32 empty = full + 8 * STAGES, mail = empty + 8 * STAGES;
  const int group = uniform(threadIdx.x / 128);
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      bar_init(full + 8 * s, GATHER ? 129 : 1);
      bar_init(empty + 8 * s, 4 * NC * CL);
    }
    bar_init(mail, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CL > 1) cluster_meet();
  else __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (group < NC) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WIDE ? 160 : 152));
    const u32 told = CL == 1 ? empty : remote(empty, min(threadIdx.x % 32, CL - 1));
    consume(p, ring, full, told, infos, group);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WIDE ? 32 : 56));
    const int thread = threadIdx.x - 128 * NC;
    if (GATHER || thread == 0)
      produce(p, &ma, &mw, &ms, &mv, ring, full, empty, mail, infos, slots, tokens, thread);
  }
  if (CL > 1) cluster_meet();  // nobody leaves while another may still write or arrive here
}
"""
