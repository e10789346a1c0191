/*
 * fuzz_hub_json.c -- whatever a hub answers: info, pages of the tree, an index; no name that is chosen leads out of the model's directory.
 *
 * The input is the three texts, separated by NUL bytes.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "choice.h"
#include "hub.h"

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *text[3] = {(const char *) data, "", ""};
	size_t		len[3] = {size, 0, 0};
	MillmRepo	repo = {.id = "a/b"};
	MillmChoice choice = {0};
	MillmError	err;

	for (int i = 0; i < 2; i++)
	{
		const char *end = memchr(text[i], '\0', len[i]);

		if (!end)
			break;
		text[i + 1] = end + 1;
		len[i + 1] = len[i] - (size_t) (end + 1 - text[i]);
		len[i] = (size_t) (end - text[i]);
	}
	if (millm_repo_read_info(&repo, text[0], len[0], &err) == MILLM_OK && (millm_repo_id_check(repo.id, NULL) != MILLM_OK || strlen(repo.commit) != 40))
		abort();
	if (millm_repo_read_page(&repo, text[1], len[1], &err) == MILLM_OK && millm_choose_small_files(&repo, &choice, &err) == MILLM_OK)
		(void) millm_choose_shards(&repo, text[2], len[2], &choice, &err);
	for (size_t i = 0; i < choice.n; i++)
	{
		const char *path = choice.files[i]->path;

		if (!path[0] || strchr(path, '/') || strcmp(path, ".") == 0 || strcmp(path, "..") == 0 || choice.files[i]->size < 0 ||
			millm_repo_find(&repo, path) == NULL)
			abort();
	}
	millm_choice_free(&choice);
	free(repo.files);
	return 0;
}
