package sync

import (
	"fmt"
	"path"
)

// Exclusion is a list of namespace names that no resource selects, with the globs of path.Match.
type Exclusion []string

// ParseExclusion checks the patterns.
func ParseExclusion(patterns []string) (Exclusion, error) {
	for _, pattern := range patterns {
		if _, err := path.Match(pattern, ""); err != nil {
			return nil, fmt.Errorf("excluded namespace %q is not a name or a glob: %w", pattern, err)
		}
	}
	return patterns, nil
}

// Matches reports whether the namespace is excluded.
func (e Exclusion) Matches(namespace string) bool {
	for _, pattern := range e {
		if ok, _ := path.Match(pattern, namespace); ok { // ParseExclusion has seen every pattern
			return true
		}
	}
	return false
}
