// Texts by their characters, as a double array: the child of a node for a character lies at the node's base plus the
// character's place in the alphabet, if it names that node as its parent. One look in memory for each character.

#pragma once

#include <algorithm>
#include <numeric>

#include "pieces_text.h"

namespace megalm::pieces {

class Trie {
 public:
  struct Unit {
    int32_t base = 0;     // of its children; 0: it has none
    int32_t parent = -1;  // -1: free
    int32_t number = -1;  // of the text that ends here
    float score = 0;      // of that text
  };

  // the place of a character in the alphabet, and of its unit as the first of a text
  uint32_t place_of(uint32_t character) const { return character < places_.size() ? places_[character] : kOther; }

  // the child of a unit for a place in the alphabet; negative: there is none
  int32_t child(int32_t unit, uint32_t place) const {
    const int32_t found = units_[unit].base + int32_t(place);
    return units_[found].parent == unit ? found : -1;
  }

  const Unit* units() const { return units_.data(); }

  // a text of at least one character; of equal ones the last counts
  void add(const std::vector<uint32_t>& text, int32_t number, float score = 0) { texts_.push_back({text, number, score}); }

  // to be called once, after all is added
  void finish() {
    std::stable_sort(texts_.begin(), texts_.end(), [](const Text& a, const Text& b) { return a.characters < b.characters; });
    const uint32_t size = number_characters();
    units_.resize(size);
    for (uint32_t place = kOther; place < size; ++place) units_[place].parent = kRoot;
    free_ = wide_ = size;
    add_children(kRoot, 0, texts_.size(), 0);
    units_.resize(units_.size() + size);  // so that every base and place is inside
    texts_ = {};
  }

  // the number of the longest text at the start of `text`, and its bytes; -1: there is none
  int32_t longest(std::string_view text, size_t* used) const {
    int32_t found = -1;
    int32_t unit = kRoot;
    for (size_t at = 0; at < text.size();) {
      const size_t bytes = character_bytes(text[at]);
      const uint32_t place = place_of(character_at(&text[at], bytes));
      unit = at ? child(unit, place) : int32_t(place);
      if (unit < 0) break;
      at += bytes;
      if (units_[unit].number >= 0) found = units_[unit].number, *used = at;
      if (!units_[unit].base) break;
    }
    return found;
  }

 private:
  static constexpr int32_t kRoot = 0;
  static constexpr uint32_t kOther = 1;  // a character that no text has
  static constexpr int kTries = 32;

  struct Text {
    std::vector<uint32_t> characters;
    int32_t number;
    float score;
  };

  // gives each character of the texts its place, in their order; the number of all places, the root's among them
  uint32_t number_characters() {
    for (const Text& text : texts_)
      for (const uint32_t character : text.characters) {
        if (character >= places_.size()) places_.resize(character + 1, kOther);
        places_[character] = kOther + 1;
      }
    uint32_t next = kOther + 1;
    for (uint32_t& place : places_)
      if (place != kOther) place = next++;
    return next;
  }

  // the units below one, which the sorted texts from `start` to `stop` have reached with `depth` characters
  void add_children(int32_t parent, size_t start, size_t stop, size_t depth) {
    for (; start < stop && texts_[start].characters.size() == depth; ++start)
      units_[parent].number = texts_[start].number, units_[parent].score = texts_[start].score;
    if (start == stop) return;
    std::vector<size_t> starts;
    for (size_t i = start; i < stop; ++i)
      if (i == start || texts_[i].characters[depth] != texts_[i - 1].characters[depth]) starts.push_back(i);
    std::vector<uint32_t> places;
    for (const size_t i : starts) places.push_back(places_[texts_[i].characters[depth]]);
    const int32_t base = parent == kRoot ? 0 : base_for(places);
    units_[parent].base = base;
    for (const uint32_t place : places) units_[base + place].parent = parent;
    starts.push_back(stop);
    for (size_t i = 0; i < places.size(); ++i) add_children(base + int32_t(places[i]), starts[i], starts[i + 1], depth + 1);
  }

  // Where all these places are free. An only child fills the first gap; more look from where they last found room.
  int32_t base_for(const std::vector<uint32_t>& places) {
    size_t& from = places.size() == 1 ? free_ : wide_;
    const uint32_t first = places.front();
    size_t at = from;
    for (int tries = 0;; ++at) {
      if (!is_free(at)) continue;
      const auto fits = [&](uint32_t place) { return is_free(at - first + place); };
      if (std::all_of(places.begin(), places.end(), fits)) break;
      if (++tries == kTries) from = at;
    }
    if (places.size() == 1) from = at;
    const size_t needed = at - first + places.back() + 1;
    if (needed > units_.size()) units_.resize(needed);
    return int32_t(at - first);
  }

  bool is_free(size_t at) const { return at >= units_.size() || units_[at].parent < 0; }

  std::vector<Text> texts_;       // until `finish`
  std::vector<uint32_t> places_;  // by character
  std::vector<Unit> units_ = std::vector<Unit>(2 + kOther);
  size_t free_ = 0, wide_ = 0;  // before these is no free unit, and little room
};

}  // namespace megalm::pieces
