package dockerconfig

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// benchConfig has n registries, the first at number offset.
func benchConfig(b *testing.B, n, offset int) Config {
	b.Helper()
	all := make([]Entry, 0, n)
	for i := range n {
		all = append(all, want{key: fmt.Sprintf("r%d.example.com/team", offset+i), username: "user", password: fmt.Sprint("password-", i)}.entry())
	}
	config, err := New(all...)
	require.NoError(b, err)
	return config
}

// Two sources of 1,000 registries that share 500.
func BenchmarkMerge1000(b *testing.B) {
	first, second := benchConfig(b, 1000, 0), benchConfig(b, 1000, 500)
	b.ReportAllocs()
	for b.Loop() {
		Merge(first, second)
	}
}

func BenchmarkRender(b *testing.B) {
	for _, n := range []int{1, 10, 1000} {
		config := benchConfig(b, n, 0)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, err := config.Render()
				require.NoError(b, err)
			}
		})
	}
}

func BenchmarkParse(b *testing.B) {
	for _, n := range []int{1, 10, 1000} {
		rendered, err := benchConfig(b, n, 0).Render()
		require.NoError(b, err)
		data := map[string][]byte{KeyDockerConfigJSON: []byte(rendered.Reveal())}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, _, err := Parse(TypeDockerConfigJSON, data)
				require.NoError(b, err)
			}
		})
	}
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 10, 1000} {
		config := benchConfig(b, n, 0)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, err := config.Match("r0.example.com/team/app:1")
				require.NoError(b, err)
			}
		})
	}
}
