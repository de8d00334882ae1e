// Encoding with the pieces and scores of a sentencepiece model, BPE or unigram, to the ids that sentencepiece gives. A
// library of its own, without torch; see megalm/kernels/pieces.py.

#include "pieces_bpe.h"
#include "pieces_encoder.h"
#include "pieces_unigram.h"

namespace {

using namespace megalm::pieces;

std::vector<Piece> pieces_of(const char* text, const int64_t* ends, const int32_t* ids, const float* scores,
                             const uint8_t* user_defined, int64_t count) {
  std::vector<Piece> pieces(count);
  for (int64_t i = 0, start = 0; i < count; start = ends[i++]) {
    pieces[i] = {{text + start, size_t(ends[i] - start)}, ids[i], scores[i], user_defined[i] != 0, {}};
    if (!read_characters(pieces[i].text, &pieces[i].characters) || pieces[i].characters.empty())
      throw std::invalid_argument("piece");
  }
  return pieces;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Option { kUnigram = 1, kTrims = 2, kDummy = 4, kSuffix = 8, kEscapes = 16 };

// Pieces lie end to end in `text`; `byte_ids`, 256, or NULL where a model has no bytes; `table` is its
// precompiled_charsmap; `options`, a sum of Option. NULL where it does not suit.
EXPORT void* megalm_pieces_new(const char* text, const int64_t* ends, const int32_t* ids, const float* scores,
                               const uint8_t* user_defined, int64_t count, const int32_t* byte_ids, int32_t unknown,
                               const char* table, int64_t table_bytes, int options) {
  try {
    const std::vector<Piece> pieces = pieces_of(text, ends, ids, scores, user_defined, count);
    std::vector<int32_t> bytes(byte_ids, byte_ids ? byte_ids + 256 : byte_ids);
    const Spec spec = {{table, size_t(table_bytes)}, bool(options & kTrims), bool(options & kDummy), bool(options & kSuffix),
                       bool(options & kEscapes)};
    if (options & kUnigram) return new StretchEncoder<Unigram>(spec, pieces, unknown, std::move(bytes));
    return new StretchEncoder<Bpe>(spec, pieces, unknown, std::move(bytes));
  } catch (const std::exception&) {
    return nullptr;
  }
}

EXPORT void megalm_pieces_delete(void* model) { delete static_cast<Encoder*>(model); }

// The ids of `count` texts of UTF-8, which lie end to end, into `out`, which has room for `room`, their numbers into
// `lengths`; the number of all ids, which is more than `room` where they were too many; -1: no memory.
EXPORT int64_t megalm_pieces_encode(void* model, const char* text, const int64_t* ends, int64_t count, int32_t* out,
                                    int64_t room, int64_t* lengths) {
  int64_t total = 0;
  try {
    for (int64_t i = 0, start = 0; i < count; start = ends[i++]) {
      const auto [ids, number] = static_cast<Encoder*>(model)->encode({text + start, size_t(ends[i] - start)});
      lengths[i] = int64_t(number);
      if (total + lengths[i] <= room) std::copy(ids, ids + number, out + total);
      total += lengths[i];
    }
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return total;
}
