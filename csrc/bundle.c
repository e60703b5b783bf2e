/* Opening a bundle from C: what bitgen/trust/files.py and bitgen/runtime.py check, without Python. See bitgen.h.
 *
 * The signature was checked when the bundle was installed; here nobody else may be able to change it since. */
#define _GNU_SOURCE /* O_CLOEXEC and O_NOFOLLOW where only POSIX.1-2001 is promised */

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitgen.h"
#include "sha256.h"

enum { MANIFEST_MAX = 16 << 20, NAME_BYTES = 256, RECORD_BYTES = 1 << 14 };

/* Where a reason goes. */
struct reason {
    char *text;
    size_t size;
};

static int32_t refuse(const struct reason *reason, int32_t code, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    if (reason->size) vsnprintf(reason->text, reason->size, format, values);
    va_end(values);
    return code;
}

/* --- who can change a file --- */

/* Whether a group is one that systems make for each user, of the same name and with nobody else in it. */
static int is_own_group(gid_t gid)
{
    struct passwd user, *found_user = NULL;
    struct group group, *found = NULL;
    char user_text[RECORD_BYTES], text[RECORD_BYTES];
    if (gid == 0) return 1;
    if (getpwuid_r(geteuid(), &user, user_text, sizeof user_text, &found_user) || !found_user) return 0;
    if (getgrgid_r(gid, &group, text, sizeof text, &found) || !found) return 0;
    for (char **member = group.gr_mem; *member; ++member)
        if (strcmp(*member, user.pw_name)) return 0;
    return !strcmp(group.gr_name, user.pw_name);
}

/* Whether only this user and root can write to it; where only owners may rename (/tmp), to what is in it. */
static int32_t require_private(const char *path, const struct stat *status, const struct reason *reason)
{
    const int kept_apart = S_ISDIR(status->st_mode) && (status->st_mode & S_ISVTX);
    if (status->st_uid != 0 && status->st_uid != geteuid())
        return refuse(reason, BITGEN_ERROR_BUNDLE, "%s belongs to another user", path);
    if ((status->st_mode & S_IWOTH) && !kept_apart)
        return refuse(reason, BITGEN_ERROR_BUNDLE, "every user can write to %s", path);
    if ((status->st_mode & S_IWGRP) && !kept_apart && !is_own_group(status->st_gid))
        return refuse(reason, BITGEN_ERROR_BUNDLE, "its group can write to %s", path);
    return BITGEN_OK;
}

/* The folder `path`, which is absolute and without links, and all above it. It is cut to "/" on the way. */
static int32_t require_private_folders(char *path, const struct reason *reason)
{
    for (;;) {
        struct stat status;
        if (stat(path, &status)) return refuse(reason, BITGEN_ERROR_BUNDLE, "cannot read %s", path);
        const int32_t code = require_private(path, &status, reason);
        char *slash = strrchr(path, '/');
        if (code || !slash || !path[1]) return code;
        slash[slash == path] = 0;
    }
}

/* Opens a regular file of the folder that only its owner can change; -1 with the code. */
static int open_private(int folder, const char *name, const struct reason *reason, int32_t *code)
{
    struct stat status;
    const int file = openat(folder, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0) *code = refuse(reason, BITGEN_ERROR_BUNDLE, "cannot open %s: %s", name, strerror(errno));
    else if (fstat(file, &status) || !S_ISREG(status.st_mode))
        *code = refuse(reason, BITGEN_ERROR_BUNDLE, "%s is no file", name);
    else *code = require_private(name, &status, reason);
    if (*code && file >= 0) close(file);
    return *code ? -1 : file;
}

/* --- the manifest: JSON --- */

static const char *skip_space(const char *p)
{
    while (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t') ++p;
    return p;
}

/* Behind a string that begins at p; NULL when it does not end. */
static const char *skip_string(const char *p)
{
    for (++p; *p && *p != '"'; ++p)
        if (*p == '\\' && !*++p) return NULL;
    return *p ? p + 1 : NULL;
}

/* Behind a value that begins at p; NULL when it does not end. */
static const char *skip_value(const char *p)
{
    int64_t depth = 0;
    for (;;) {
        if (*p == '"') {
            p = skip_string(p);
            if (!p) return NULL;
        } else {
            if (!*p) return NULL;
            if (*p == '{' || *p == '[') ++depth;
            if (*p == '}' || *p == ']') --depth;
            ++p;
        }
        if (depth < 0) return NULL;
        if (depth == 0 && (*p == ',' || *p == '}' || *p == ']' || !*p)) return p;
    }
}

/* The value of a member of the object at p, whose key has no escapes; NULL when there is none. */
static const char *member_of(const char *p, const char *key)
{
    const size_t length = strlen(key);
    if (!p || *p != '{') return NULL;
    p = skip_space(p + 1);
    while (*p == '"') {
        const char *name = p + 1, *end = skip_string(p);
        if (!end) return NULL;
        p = skip_space(end);
        if (*p != ':') return NULL;
        p = skip_space(p + 1);
        if ((size_t)(end - 1 - name) == length && !strncmp(name, key, length)) return p;
        p = skip_value(p);
        if (!p) return NULL;
        p = skip_space(p);
        if (*p == ',') p = skip_space(p + 1);
    }
    return NULL;
}

/* Copies a string value without escapes; whether there is one that fits. */
static int copy_string(const char *value, char *text, size_t size)
{
    const char *end = value && *value == '"' ? skip_string(value) : NULL;
    const size_t length = end ? (size_t)(end - 2 - value) : size;
    if (length >= size || memchr(value, '\\', length + 1)) return 0;
    memcpy(text, value + 1, length);
    text[length] = 0;
    return 1;
}

/* The whole text of an open file, to be freed; NULL when it cannot be read or is too long. */
static char *text_of(int file)
{
    size_t used = 0, size = 1 << 16;
    char *text = malloc(size);
    while (text) {
        const ssize_t count = read(file, text + used, size - used - 1);
        if (count <= 0) {
            text[used] = 0;
            if (count == 0 && !memchr(text, 0, used)) return text;
            break;
        }
        used += (size_t)count;
        if (size - used > 1) continue;
        char *larger = size < MANIFEST_MAX ? realloc(text, size *= 2) : NULL;
        if (!larger) break;
        text = larger;
    }
    free(text);
    return NULL;
}

/* The library that a manifest names, and its sha256. */
static int32_t read_manifest(int folder, char library[NAME_BYTES], char sha256[65], const struct reason *reason)
{
    int32_t code = BITGEN_OK;
    const int file = open_private(folder, "manifest.json", reason, &code);
    if (code) return code;
    char *text = text_of(file);
    close(file);
    const char *root = text ? skip_space(text) : "", *abi = member_of(root, "abi_version");
    if (!abi) code = refuse(reason, BITGEN_ERROR_BUNDLE, "manifest.json is damaged");
    else if (strtol(abi, NULL, 10) != BITGEN_ABI_VERSION)
        code = refuse(reason, BITGEN_ERROR_BUNDLE, "it has ABI version %ld, this library %d", strtol(abi, NULL, 10),
                      BITGEN_ABI_VERSION);
    else if (!copy_string(member_of(root, "library"), library, NAME_BYTES) || !*library || strchr(library, '/') ||
             !copy_string(member_of(member_of(root, "files"), library), sha256, 65))
        code = refuse(reason, BITGEN_ERROR_BUNDLE, "manifest.json names no library");
    free(text);
    return code;
}

/* --- the library --- */

static int has_sha256(int file, const char *wanted)
{
    uint8_t data[1 << 14];
    char text[65];
    struct sha256 digest;
    sha256_begin(&digest);
    for (off_t at = 0;;) {
        const ssize_t count = pread(file, data, sizeof data, at);
        if (count < 0) return 0;
        if (count == 0) break;
        sha256_add(&digest, data, (size_t)count);
        at += count;
    }
    sha256_end(&digest, text);
    return !strcmp(text, wanted);
}

/* Loads what was checked: on Linux the descriptor itself. Equal names are one library to a loader and numbers of
 * descriptors come again, so each time the path is spelt anew, by a dot or none for each bit of a counter. */
static void *load_checked(int file, const char *path)
{
    char name[PATH_MAX];
    static atomic_uint opened = 1;
    struct stat status;
    if (stat("/proc/self/fd", &status)) return dlopen(path, RTLD_NOW | RTLD_LOCAL);
    size_t used = (size_t)snprintf(name, sizeof name, "/proc/self/fd");
    for (unsigned bits = atomic_fetch_add(&opened, 1); bits; bits /= 2)
        used += (size_t)snprintf(name + used, sizeof name - used, bits % 2 ? "/." : "/");
    snprintf(name + used, sizeof name - used, "/%d", file);
    return dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

/* Whether an opened library is of this ABI and runs here. */
static int32_t require_usable(void *handle, const struct reason *reason)
{
    int32_t (*abi_version)(void);
    const char *(*missing)(void);
    *(void **)&abi_version = dlsym(handle, "bitgen_abi_version"); /* as POSIX wants a function's address taken */
    *(void **)&missing = dlsym(handle, "bitgen_missing_features");
    if (!abi_version || !missing) return refuse(reason, BITGEN_ERROR_BUNDLE, "its library is not one of bitgen");
    if (abi_version() != BITGEN_ABI_VERSION)
        return refuse(reason, BITGEN_ERROR_BUNDLE, "its library has ABI version %d, this one %d", (int)abi_version(),
                      BITGEN_ABI_VERSION);
    if (*missing()) return refuse(reason, BITGEN_ERROR_UNSUPPORTED_CPU, "this CPU lacks %s", missing());
    return BITGEN_OK;
}

static int32_t open_library(int folder, const char *path, void **library, const struct reason *reason)
{
    char name[NAME_BYTES], sha256[65], file_path[PATH_MAX + NAME_BYTES + 1];
    int32_t code = read_manifest(folder, name, sha256, reason);
    if (code) return code;
    const int file = open_private(folder, name, reason, &code);
    if (code) return code;
    snprintf(file_path, sizeof file_path, "%s/%s", path, name);
    void *handle = NULL;
    if (!has_sha256(file, sha256))
        code = refuse(reason, BITGEN_ERROR_BUNDLE, "%s is not the file that its manifest names", name);
    else if (!(handle = load_checked(file, file_path)))
        code = refuse(reason, BITGEN_ERROR_BUNDLE, "cannot load %s: %s", name, dlerror());
    else code = require_usable(handle, reason);
    close(file);
    if (!code) *library = handle;
    else if (handle) dlclose(handle);
    return code;
}

int32_t bitgen_bundle_open(const char *folder, void **library, char *reason, int64_t reason_bytes)
{
    if (!folder || !library || (!reason && reason_bytes)) return BITGEN_ERROR_NULL;
    if (reason_bytes < 0) return BITGEN_ERROR_ARGUMENT;
    const struct reason told = {reason, (size_t)reason_bytes};
    char path[PATH_MAX], above[PATH_MAX];
    *library = NULL;
    if (reason_bytes) *reason = 0;
    if (!realpath(folder, path))
        return refuse(&told, BITGEN_ERROR_BUNDLE, "cannot open %s: %s", folder, strerror(errno));
    const int opened = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (opened < 0) return refuse(&told, BITGEN_ERROR_BUNDLE, "cannot open %s: %s", path, strerror(errno));
    memcpy(above, path, sizeof above);
    int32_t code = require_private_folders(above, &told);
    if (!code) code = open_library(opened, path, library, &told);
    close(opened);
    return code;
}
