package sync

import (
	"path"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExclusionMatchesNamesAndGlobs(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		patterns []string
		matches  []string
		not      []string
	}{
		"nothing is excluded by default": {nil, nil, []string{"default", "kube-system"}},
		"a name is that name alone":      {[]string{"kube-system"}, []string{"kube-system"}, []string{"kube-system-2", "kube", "my-kube-system"}},
		"a star is any text":             {[]string{"kube-*"}, []string{"kube-system", "kube-"}, []string{"kube", "my-kube-system"}},
		"a star alone is everything":     {[]string{"*"}, []string{"default"}, nil},
		"a question mark is one letter":  {[]string{"team-?"}, []string{"team-a"}, []string{"team-", "team-ab"}},
		"a class is one of its letters":  {[]string{"team-[a-c]"}, []string{"team-b"}, []string{"team-d"}},
		"any pattern is enough":          {[]string{"a", "b*"}, []string{"a", "bc"}, []string{"ab"}},
	}
	for name, test := range tests {
		exclusion, err := ParseExclusion(test.patterns)
		require.NoError(t, err, name)
		for _, namespace := range test.matches {
			require.True(t, exclusion.Matches(namespace), "%s: %s", name, namespace)
		}
		for _, namespace := range test.not {
			require.False(t, exclusion.Matches(namespace), "%s: %s", name, namespace)
		}
	}
}

func TestAnExclusionThatIsNoPatternIsRefusedAtOnce(t *testing.T) {
	t.Parallel()
	for _, pattern := range []string{"[", "a[", "a*[", "kube-*[a-", `x\`, "[]a]", "[a-]"} {
		exclusion, err := ParseExclusion([]string{"good", pattern})
		require.ErrorIs(t, err, path.ErrBadPattern, pattern)
		require.ErrorContains(t, err, "excluded namespace")
		require.Nil(t, exclusion)
	}
}

// Whatever ParseExclusion takes, Matches can use.
func FuzzExclusion(f *testing.F) {
	for _, seed := range []string{"", "kube-*", "[a-c]", "a[", `\`, "*[", "?*?"} {
		f.Add(seed, "kube-system")
	}
	f.Fuzz(func(t *testing.T, pattern, namespace string) {
		exclusion, err := ParseExclusion([]string{pattern})
		if err != nil {
			return
		}
		want, err := path.Match(pattern, namespace)
		require.NoError(t, err)
		require.Equal(t, want, exclusion.Matches(namespace))
	})
}
