/* Calls one function of the C backend on what a file describes, for test_arm.py:
 *
 *     emulated_arm FUNCTION INPUT OUTPUT
 *
 * INPUT: the number of fields of the matrix, the fields, the number of arguments, the arguments;
 * each of these a kind (0 a number, 1 a buffer, 2 a buffer to be written to OUTPUT afterwards), a
 * number or a length in bytes, and the bytes of a buffer. All numbers are int64. The exit status is
 * what the function returns; 100 and more say what is wrong with the input. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUNCTIONS(F) F(gptvq_linear) F(gptvq_product) F(gptvq_most_tokens) F(vptq_linear) \
    F(vptq_product) F(cvxq_linear) F(cvxq_product)
#define DECLARE(NAME) extern int hf_vq_##NAME();
FUNCTIONS(DECLARE)

/* every argument takes a register or a place of 8 bytes on the stack */
typedef int (*function_t)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
static const struct {
    const char *name;
    function_t call;
} functions[] = {
#define NAMED(NAME) {"hf_vq_" #NAME, (function_t)hf_vq_##NAME},
    FUNCTIONS(NAMED)};

static int64_t number(FILE *file) {
    int64_t value;
    if (fread(&value, 8, 1, file) != 1) exit(100);
    return value;
}

static void *written;
static int64_t written_bytes;

static int64_t item(FILE *file) {
    int64_t kind = number(file), value = number(file);
    if (kind == 0) return value;
    void *bytes = aligned_alloc(64, (size_t)(value / 64 + 1) * 64);
    if (!bytes || fread(bytes, 1, (size_t)value, file) != (size_t)value) exit(101);
    if (kind == 2) written = bytes, written_bytes = value;
    return (int64_t)bytes;
}

int main(int count, char **words) {
    if (count != 4) return 102;
    FILE *file = fopen(words[2], "rb");
    if (!file) return 103;
    int64_t matrix[64], a[9] = {0}, fields = number(file);
    for (int64_t i = 0; i < fields; i++) matrix[i] = item(file);
    a[0] = (int64_t)matrix;
    int64_t arguments = number(file);
    for (int64_t i = 1; i <= arguments; i++) a[i] = item(file);
    fclose(file);
    for (size_t f = 0; f < sizeof functions / sizeof *functions; f++) {
        if (strcmp(functions[f].name, words[1])) continue;
        int status = functions[f].call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
        FILE *out = fopen(words[3], "wb");
        if (!out || fwrite(written, 1, (size_t)written_bytes, out) != (size_t)written_bytes) return 104;
        fclose(out);
        return status;
    }
    return 105;
}
