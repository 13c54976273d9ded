// Counts of scores by their keys, and where the largest are; peftkern/ops/select_top.py says what a score and its key
// are. Keys are computed over short buffers, whose loops the compiler vectorises for each instruction set.
#pragma once

constexpr int64_t kKeyBuffer = 256;
constexpr int64_t kKeyGroup = 32;  // keys that are passed over together where none of them is asked for

struct KeyBuffer {
  alignas(64) float a[kKeyBuffer] = {};
  alignas(64) float other[kKeyBuffer] = {};
  alignas(64) uint32_t keys[kKeyBuffer] = {};
};

// ---- keys

static uint32_t key_of(float score) {
  const uint32_t bits = float_bits(score + 0.0f);  // -0 + 0 is +0
  const uint32_t key = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return score != score ? 0xFFFFFFFFu : key;
}

template <Score kScore>
static void keys_of(const float* a, const float* other, uint32_t* keys) {
  for (int64_t j = 0; j < kKeyBuffer; ++j) {
    float score = a[j];
    if (kScore == Score::difference) score -= other[j];
    if (kScore == Score::product || kScore == Score::outer) score *= other[j];
    if (kScore != Score::value && kScore != Score::outer) score = bits_float(float_bits(score) & 0x7FFFFFFFu);
    keys[j] = key_of(score);
  }
}

static void read_outer(const Scores& s, int64_t begin, int64_t count, KeyBuffer* buffer) {
  for (int64_t j = 0; j < count;) {
    const int64_t row = (begin + j) / s.columns, column = (begin + j) % s.columns;
    const int64_t run = s.columns - column < count - j ? s.columns - column : count - j;
    const float factor = load_float(s.a, s.a_dtype, row);
    for (int64_t k = 0; k < run; ++k) buffer->a[j + k] = factor;
    read_floats(s.other, s.other_dtype, column, run, buffer->other + j);
    j += run;
  }
}

// The keys of `count` elements. `excluded` is how many of the excluded ones come before; it is moved on.
static void read_keys(const Scores& s, int64_t begin, int64_t count, int64_t* excluded, KeyBuffer* buffer) {
  if (s.score == Score::outer) {
    read_outer(s, begin, count, buffer);
    keys_of<Score::outer>(buffer->a, buffer->other, buffer->keys);
  } else {
    const float* a = floats_at(s.a, s.a_dtype, begin, count, buffer->a);
    const float* other = s.other == nullptr ? nullptr : floats_at(s.other, s.other_dtype, begin, count, buffer->other);
    if (s.score == Score::magnitude) keys_of<Score::magnitude>(a, other, buffer->keys);
    if (s.score == Score::value) keys_of<Score::value>(a, other, buffer->keys);
    if (s.score == Score::difference) keys_of<Score::difference>(a, other, buffer->keys);
    if (s.score == Score::product) keys_of<Score::product>(a, other, buffer->keys);
  }
  for (; *excluded < s.exclude_count && s.exclude[*excluded] < begin + count; ++*excluded)
    buffer->keys[s.exclude[*excluded] - begin] = 0;
}

// How many of the excluded elements come before `element`.
static int64_t excluded_before(const Scores& s, int64_t element) {
  int64_t first = 0, last = s.exclude_count;
  while (first < last) {
    const int64_t middle = first + (last - first) / 2;
    if (s.exclude[middle] < element)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

// ---- counts

// Tables side by side: counts of equal digits one after the other would wait for each other.
constexpr int kTables = 4;

struct Counts {
  uint32_t of[kTables][kScoreBuckets] = {};
};

// The digits of up to `count` keys below the prefix, packed; returns how many.
static int64_t pack_digits(const uint32_t* keys, int64_t count, const Digit& digit, uint32_t* digits) {
  const int above = digit.shift + digit.bits;
  if (above == 32) {
    for (int64_t j = 0; j < kKeyGroup; ++j) digits[j] = keys[j] >> digit.shift;
    return count;
  }
  const uint32_t low_bits = (uint32_t{1} << digit.bits) - 1;
  int64_t found = 0;
  for (int64_t j = 0; j < count; ++j) {
    digits[found] = keys[j] >> digit.shift & low_bits;
    found += keys[j] >> above == digit.prefix ? 1 : 0;
  }
  return found;
}

static bool any_below_prefix(const uint32_t* keys, const Digit& digit) {
  const int above = digit.shift + digit.bits;
  if (above == 32) return true;
  uint32_t any = 0;
  for (int64_t j = 0; j < kKeyGroup; ++j) any |= static_cast<uint32_t>(keys[j] >> above == digit.prefix);
  return any != 0;
}

// Adds to `counts` how many keys of the elements [begin, end) have each value of the digit.
static void score_counts(const Scores& s, const Digit& digit, int64_t begin, int64_t end, int64_t* counts) {
  KeyBuffer buffer;
  Counts tables;
  uint32_t digits[kKeyGroup];
  int64_t excluded = excluded_before(s, begin);
  for (int64_t i = begin; i < end; i += kKeyBuffer) {
    const int64_t count = end - i < kKeyBuffer ? end - i : kKeyBuffer;
    read_keys(s, i, count, &excluded, &buffer);
    for (int64_t j = 0; j < count; j += kKeyGroup) {
      if (!any_below_prefix(buffer.keys + j, digit)) continue;
      const int64_t found = pack_digits(buffer.keys + j, count - j < kKeyGroup ? count - j : kKeyGroup, digit, digits);
      for (int64_t k = 0; k < found; ++k) ++tables.of[k % kTables][digits[k]];
    }
  }
  for (int bucket = 0; bucket < kScoreBuckets; ++bucket)
    for (int table = 0; table < kTables; ++table) counts[bucket] += tables.of[table][bucket];
}

// ---- collecting

// Counts the keys of the elements [begin, end) that are above `key`, and those that equal it.
static void score_compare(const Scores& s, uint32_t key, int64_t begin, int64_t end, int64_t* above, int64_t* equal) {
  KeyBuffer buffer;
  int64_t excluded = excluded_before(s, begin);
  for (int64_t i = begin; i < end; i += kKeyBuffer) {
    const int64_t count = end - i < kKeyBuffer ? end - i : kKeyBuffer;
    read_keys(s, i, count, &excluded, &buffer);
    uint32_t larger = 0, same = 0;
    for (int64_t j = 0; j < count; ++j) {
      larger += buffer.keys[j] > key ? 1 : 0;
      same += buffer.keys[j] == key ? 1 : 0;
    }
    *above += larger;
    *equal += same;
  }
}

// Writes the ascending indices, within [begin, end), of the keys above `key` and of the first `ties` that equal it.
static void score_collect(const Scores& s, uint32_t key, int64_t ties, int64_t begin, int64_t end, int64_t* out) {
  KeyBuffer buffer;
  int64_t excluded = excluded_before(s, begin);
  for (int64_t i = begin; i < end; i += kKeyBuffer) {
    const int64_t count = end - i < kKeyBuffer ? end - i : kKeyBuffer;
    read_keys(s, i, count, &excluded, &buffer);
    for (int64_t j = 0; j < count; j += kKeyGroup) {
      uint32_t any = 0;
      for (int64_t k = 0; k < kKeyGroup; ++k) any |= static_cast<uint32_t>(buffer.keys[j + k] >= key);
      if (any == 0) continue;
      const int64_t group_end = count - j < kKeyGroup ? count : j + kKeyGroup;
      for (int64_t k = j; k < group_end; ++k) {
        if (buffer.keys[k] < key || (buffer.keys[k] == key && ties == 0)) continue;
        if (buffer.keys[k] == key) --ties;
        *out++ = i + k;
      }
    }
  }
}
