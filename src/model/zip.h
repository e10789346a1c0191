/*
 * zip.h -- where the members of a zip archive lie, for archives that torch.save() writes: stored, not compressed.
 */
#ifndef MILLM_ZIP_H
#define MILLM_ZIP_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

typedef struct MillmZipMember
{
	const char *name;			/* the archive's */
	uint64_t	offset;			/* of its bytes in the file */
	uint64_t	bytes;
	uint64_t	header;			/* where what belongs to it begins */
} MillmZipMember;

typedef struct MillmZip MillmZip;

/*
 * Read the directory of the file that fd has open for reading; fd is not used after.  name is for messages.  The members lie in the file, in front of
 * the directory, do not overlap, and each name comes once.  Their checksums are not looked at.
 * INVALID_MODEL_FILE: damaged, compressed, encrypted, or of several parts.
 */
extern MillmCode millm_zip_open(int fd, const char *name, MillmZip **out, MillmError *err);
extern void millm_zip_close(MillmZip *zip);	/* NULL is fine */

extern size_t millm_zip_n_members(const MillmZip *zip);
extern const MillmZipMember *millm_zip_member(const MillmZip *zip, size_t i);	/* in order of their names */
extern const MillmZipMember *millm_zip_find(const MillmZip *zip, const char *name);	/* NULL: there is none */

#endif
