// Where things lie: volumes, chunks of the long contraction, programs, and the fragments of matrix instructions.
//
// A volume is dense in channels-last order: voxel v has its channels at v * row, and row is C, or more where the
// volume is a part of a wider product. A step along one axis reads it as x[n, s, p, c], slice s and position p within
// it:
//
//     voxel(n, s, p) = n * sample + s * slice + (p / inner) * outer_step + (p % inner) * inner_step
//
// The columns of a slice are its pairs of position and channel, k = p * C + c, 0 <= k < P * C. A chunk is a run of
// them, as long as a tile is wide. Offsets are 64-bit.
#pragma once

#include "platform.cuh"

namespace rsa {

struct Geometry {
  int64_t batch, slices, channels;
  int64_t positions, inner;
  int64_t sample, slice, outer_step, inner_step;  // in voxels

  RSA_SHARED int64_t columns() const { return positions * channels; }
};

// The geometry of a step along axis 2, 3 or 4 of (N, C, D, H, W).
RSA_SHARED Geometry geometry(int64_t batch, int64_t channels, int64_t depth, int64_t height, int64_t width, int axis) {
  const int64_t sample = depth * height * width;
  if (axis == 2) {
    return {batch, depth, channels, height * width, height * width, sample, height * width, 0, 1};
  }
  if (axis == 3) {
    return {batch, height, channels, depth * width, width, sample, width, height * width, 1};
  }
  return {batch, width, channels, depth * height, depth * height, sample, 1, 0, width};
}

RSA_SHARED int64_t ceil_divide(int64_t amount, int64_t size) { return (amount + size - 1) / size; }

// Maps that products read are padded with zeros to so many slices, and then every row is aligned.
RSA_SHARED int64_t padded_slices(int64_t slices) { return ceil_divide(slices, 16) * 16; }

// A column: its voxel from a slice's first, and its channel.
struct Column {
  int64_t voxel, channel;
  bool exists;
};

RSA_SHARED Column column_at(const Geometry& shape, int64_t k) {
  // Dividends and divisors below 2^32 take the short way of the 64-bit division.
  const int64_t position = k / shape.channels;
  const int64_t outer = position / shape.inner;
  return {outer * shape.outer_step + (position - outer * shape.inner) * shape.inner_step,
          k - position * shape.channels, k < shape.columns()};
}

RSA_SHARED int64_t element(const Geometry& shape, int64_t row, int64_t sample, int64_t slice, const Column& column) {
  return (sample * shape.sample + slice * shape.slice + column.voxel) * row + column.channel;
}

// The programs of a launch: those that work on one chunk are neighbours, so that they find it in cache.
struct Program {
  int64_t tile, part, sample;
};

RSA_SHARED Program program_at(int64_t block, int64_t tiles, int64_t parts) {
  return {block % tiles, block / tiles % parts, block / tiles / parts};
}

// Programs that share a sample's chunks: part p works on chunks p, p + parts, ... At least `least` chunks for each.
RSA_SHARED int64_t parts_of(int64_t chunks, int64_t tiles, int64_t batch, int64_t programs, int64_t least) {
  const int64_t wanted = programs / (tiles * batch);
  const int64_t most = chunks / least;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts;
}

RSA_SHARED int64_t chunks_of_part(int64_t chunks, int64_t part, int64_t parts) {
  return part < chunks ? (chunks - part - 1) / parts + 1 : 0;
}

// Bytes that a thread copies at once: 16 if that divides all places where a voxel starts, else one number, but 4
// rather than 2 where that can be.
RSA_SHARED int width_of(uint64_t address, int64_t channels, int64_t row, int number) {
  const uint64_t places = address | static_cast<uint64_t>(channels * number) | static_cast<uint64_t>(row * number);
  return places % 16 == 0 ? 16 : number < 4 && places % 4 == 0 ? 4 : number;
}

// Tiles in shared memory have rows of so many bytes. The padding puts the rows that a warp reads together into
// different banks: 16 bytes where a lane reads 16, 32 where eight lanes read neighbours of 4 bytes in each of four
// rows.
RSA_SHARED constexpr int shared_row(int bytes, int padding) { return bytes + padding; }

// Fragments of m16n8 products. Lane l holds of a 16 x 8 sum the columns 2 (l % 4) and the next, of rows l / 4 and
// l / 4 + 8. Of operands, ldmatrix hands each lane 4 bytes: those at 4 (l % 4) of row l / 4 of an 8 x 16-byte matrix.
RSA_SHARED int sum_row(int lane, int entry) { return lane / 4 + entry / 2 * 8; }
RSA_SHARED int sum_column(int lane, int entry) { return lane % 4 * 2 + entry % 2; }

// Which row and byte a lane names to ldmatrix: for the left operand (16 rows x 32 bytes) ...
RSA_SHARED int left_row(int lane) { return lane % 16; }
RSA_SHARED int left_byte(int lane) { return lane / 16 * 16; }
// ... for two right operands whose rows are columns of the product (16 rows x 32 bytes) ...
RSA_SHARED int right_row(int lane) { return lane / 16 * 8 + lane % 8; }
RSA_SHARED int right_byte(int lane) { return lane / 8 % 2 * 16; }
// ... and for two whose rows are summed over (16 rows x 2 x 16 bytes, transposed on the way).
RSA_SHARED int summed_row(int lane) { return lane % 16; }
RSA_SHARED int summed_byte(int lane) { return lane / 16 * 16; }

}  // namespace rsa
