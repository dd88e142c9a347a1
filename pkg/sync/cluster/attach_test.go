package cluster

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

func TestAttach(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		list, attached, wanted, kept string
		names, remembered            string
	}{
		"nothing is wanted of an empty one":             {},
		"a user's entries are left alone":               {list: "b a", names: "b a"},
		"what is wanted is added at the end":            {list: "b a", wanted: "pull", names: "b a pull", remembered: "pull"},
		"several, sorted":                               {list: "b", wanted: "y x", names: "b x y", remembered: "x y"},
		"it is there already":                           {list: "b pull a", attached: "pull", wanted: "pull", names: "b pull a", remembered: "pull"},
		"a user's own entry of that name":               {list: "pull a", wanted: "pull", names: "pull a"},
		"which stays when it is not wanted any more":    {list: "pull a", names: "pull a"},
		"what is not wanted any more is taken out":      {list: "b pull a", attached: "pull", names: "b a"},
		"of two of that name the later one":             {list: "pull a pull", attached: "pull", names: "pull a"},
		"somebody has taken it out":                     {list: "b", attached: "pull", wanted: "pull", names: "b pull", remembered: "pull"},
		"and it is not wanted either":                   {list: "b", attached: "pull", names: "b"},
		"another name of the Secret":                    {list: "b old", attached: "old", wanted: "new", names: "b new", remembered: "new"},
		"another name, while the old one is kept":       {list: "b old", attached: "old", wanted: "new", kept: "old", names: "b old new", remembered: "old new"},
		"what is kept is not added again":               {list: "b", attached: "old", kept: "old", names: "b"},
		"an annotation that names what is not there":    {list: "b", attached: "x y", names: "b"},
		"an annotation that somebody took off":          {list: "b pull", wanted: "pull", names: "b pull"},
		"an annotation with more than one, one is kept": {list: "a b c", attached: "a b c", wanted: "b", kept: "c", names: "b c", remembered: "b c"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			kept := func(name string) bool { return slices.Contains(strings.Fields(test.kept), name) }
			list := strings.Fields(test.list)
			names, remembered := attach(list, strings.Fields(test.attached), strings.Fields(test.wanted), kept)
			require.Equal(t, test.names, strings.Join(names, " "))
			require.Equal(t, test.remembered, strings.Join(remembered, " "))
			require.Equal(t, strings.Fields(test.list), list, "it is not changed")
			again, rememberedAgain := attach(names, remembered, strings.Fields(test.wanted), kept)
			require.Equal(t, names, again, "and that is all")
			require.ElementsMatch(t, remembered, rememberedAgain)
		})
	}
}

// Whatever users and resources do, the users' entries are as they left them, in their order, and once nothing is wanted any
// more nothing else is there.
func TestAttachLosesNobodysEntries(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		users, list, attached := []string{}, []string{}, []string(nil)
		for range 30 {
			switch random.IntN(4) {
			case 0: // a user appends an entry that imps has not
				if name := string(rune('a' + random.IntN(6))); !slices.Contains(list, name) {
					users, list = append(users, name), append(list, name)
				}
			case 1: // a user removes an own one
				if len(users) > 0 {
					i := random.IntN(len(users))
					list = slices.Delete(list, slices.Index(list, users[i]), slices.Index(list, users[i])+1)
					users = slices.Delete(users, i, i+1)
				}
			default:
				var wanted []string
				for name := 'a'; name < 'j'; name++ {
					if random.IntN(3) == 0 {
						wanted = append(wanted, string(name))
					}
				}
				list, attached = attach(list, attached, wanted, func(string) bool { return false })
				for _, name := range wanted {
					require.Contains(t, list, name)
				}
			}
		}
		list, attached = attach(list, attached, nil, func(string) bool { return false })
		require.Equal(t, users, append([]string{}, list...))
		require.Empty(t, attached)
	}
}

func TestTheAnnotationIsReadWhateverSomebodyHasWrittenIntoIt(t *testing.T) {
	t.Parallel()
	for value, want := range map[string][]string{
		"": nil, "pull": {"pull"}, "a,b": {"a", "b"}, " a , ,b,a,": {"a", "b"}, ",": nil, "a b": {"a b"},
	} {
		require.Equal(t, want, parseAttached(value), value)
	}
}

func TestTheChangeOfAServiceAccountIsAConflictWhereAnythingElseWasChanged(t *testing.T) {
	t.Parallel()
	var patched corev1.ServiceAccount
	patch, err := (&attachment{was: account{uid: "u", resourceVersion: "7"}, names: []string{"a", "pull"}, remembered: []string{"pull", "x"}}).patch()
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(patch, &patched))
	require.Equal(t, corev1.ServiceAccount{
		ObjectMeta:       metav1.ObjectMeta{UID: "u", ResourceVersion: "7", Annotations: map[string]string{impsync.AnnotationAttached: "pull,x"}},
		ImagePullSecrets: []corev1.LocalObjectReference{{Name: "a"}, {Name: "pull"}},
	}, patched)
	require.Equal(t, account{uid: "u", resourceVersion: "7", pullSecrets: []string{"a", "pull"}, attached: []string{"pull", "x"}}, accountOf(&patched))
	patch, err = (&attachment{}).patch()
	require.NoError(t, err)
	require.JSONEq(t, `{"metadata":{"uid":"","resourceVersion":"","annotations":{"images.banzaicloud.io/attached":null}},"imagePullSecrets":[]}`, string(patch))
}

// accounts has the term know these ServiceAccounts of the namespace n, "name: names; attached".
func (s *situation) withAccounts(t *testing.T, accounts map[string]string) {
	t.Helper()
	list := &corev1.ServiceAccountList{ListMeta: metav1.ListMeta{ResourceVersion: "10"}}
	for name, text := range accounts {
		names, attached, _ := strings.Cut(text, ";")
		a := corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{
			Namespace: "n", Name: name, UID: types.UID(name), ResourceVersion: "5", Annotations: map[string]string{impsync.AnnotationAttached: attached},
		}}
		for secret := range strings.FieldsSeq(names) {
			a.ImagePullSecrets = append(a.ImagePullSecrets, corev1.LocalObjectReference{Name: secret})
		}
		list.Items = append(list.Items, a)
	}
	s.accounts = synced(t, impsync.MirrorConfig[account]{
		Name: "ServiceAccounts", Example: &corev1.ServiceAccount{}, Log: s.log, OnChange: s.accountChanged,
		Convert: func(o runtime.Object) account { return accountOf(o.(*corev1.ServiceAccount)) }, Version: func(a account) string { return a.resourceVersion },
	}, list)
}

// What is not known for sure takes nothing out.
func TestWhatIsAttachedStaysUntilItIsKnownThatNobodyWantsIt(t *testing.T) {
	t.Parallel()
	all := &v1alpha1.ServiceAccountSelector{Names: []string{"sa"}}
	for name, test := range map[string]struct {
		prepare func(t *testing.T, s *situation)
		has     string
		want    string // "" for no change
	}{
		"it is selected": {
			func(t *testing.T, s *situation) {
				s.claimOf(t, resource(t, "a", 0, byName), 7).accounts, _ = impsync.CompileAccounts(all)
			}, "b", "b pull; pull",
		},
		"it is selected, and the resource attaches nothing": {
			func(t *testing.T, s *situation) { s.claimOf(t, resource(t, "a", 0, byName), 7) }, "b pull;pull", "b; ",
		},
		"nothing selects the namespace": {
			func(t *testing.T, s *situation) { s.claimOf(t, resource(t, "a", 0, byNone), 7) }, "b pull;pull", "b; ",
		},
		"nothing does, and the Secret is there yet": {
			func(t *testing.T, s *situation) { s.there(s.claimOf(t, resource(t, "a", 0, byNone), 7)) }, "b pull;pull", "",
		},
		"nothing does, and it is not known yet whether the Secret is there": {
			func(t *testing.T, s *situation) {
				s.claimOf(t, resource(t, "a", 0, byNone), 7)
				s.targets["pull"] = impsync.NewMirror(impsync.MirrorConfig[impsync.Existing]{})
			}, "b pull;pull", "",
		},
		"nothing does, and a user's Secret is there": {
			func(t *testing.T, s *situation) { s.there(s.claimOf(t, resource(t, "a", 0, byNone), 7), users) }, "b pull;pull", "b; ",
		},
		"the newest spec has a problem": {
			func(t *testing.T, s *situation) {
				s.claimOf(t, resource(t, "a", 0, byNone), 7).problem = errors.New("x")
			}, "b pull;pull", "",
		},
		"what a resource wants is not known yet": {
			func(t *testing.T, s *situation) {
				r := resource(t, "a", 0, byName)
				s.byUID[r.UID] = r
			}, "b pull;pull", "",
		},
		"the resource is going": {
			func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byName), 7)
				c.accounts, _ = impsync.CompileAccounts(all)
				now := metav1.Now()
				s.byUID["uid-a"].DeletionTimestamp = &now
			}, "b pull;pull", "b; ",
		},
		"no resource has that name any more": {func(*testing.T, *situation) {}, "b other;other", "b; "},
		"a name that none may have":          {func(*testing.T, *situation) {}, "b nope;nope", ""},
		"the namespace is being deleted": {
			func(_ *testing.T, s *situation) {
				s.namespaces.Put(types.NamespacedName{Name: "n"}, namespaceMeta{terminating: true})
			}, "b pull;pull", "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				test.prepare(t, s)
				s.withAccounts(t, map[string]string{"sa": test.has})
				change := s.judgeAccount(types.NamespacedName{Namespace: "n", Name: "sa"}, s.now)
				if test.want == "" {
					require.Nil(t, change)
					return
				}
				require.Equal(t, test.want, strings.Join(change.names, " ")+"; "+strings.Join(change.remembered, " "))
			})
		})
	}
}

// Who takes an entry out again and again is not fought; and our own change of mind is not taken for that.
func TestEntriesThatSomebodyTakesOutAreCounted(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		c.accounts, _ = impsync.CompileAccounts(&v1alpha1.ServiceAccountSelector{Names: []string{"sa"}})
		s.withAccounts(t, map[string]string{"sa": "b"})
		key := types.NamespacedName{Namespace: "n", Name: "sa"}
		with := account{uid: "sa", resourceVersion: "20", pullSecrets: []string{"b", "pull"}, attached: []string{"pull"}}
		without := account{uid: "sa", resourceVersion: "21", pullSecrets: []string{"b"}}
		s.writing[key] = true
		for range 10 {
			s.accountChanged(key, &with, &without)
		}
		delete(s.writing, key)
		require.Empty(t, s.undone)
		for i := range 6 {
			require.NotNil(t, s.judgeAccount(key, time.Now()), i)
			s.accountChanged(key, &with, &without)
			wait := s.undone[key].wait(time.Now())
			require.Equal(t, []time.Duration{0, 0, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second}[i], wait, i)
			require.Equal(t, wait > 0, s.judgeAccount(key, time.Now()) == nil)
			<-time.After(wait)
		}
		require.Contains(t, s.accountsReady(c).Message, "0 of 0")
		c.outcomes["n"] = outcome{kind: delivered}
		require.Contains(t, s.accountsReady(c).Message, "0 of 1 ServiceAccounts name the Secret; not n/sa: somebody takes the entry out")
		<-time.After(2*repairMaxDelay + time.Second)
		s.queuedAccounts()
		s.accountChanged(key, &with, &without)
		require.Equal(t, []string{"n"}, s.queuedAccounts())
		s.accountChanged(key, &without, &without)
		require.Empty(t, s.queuedAccounts(), "a write of ours that is known")
		require.Equal(t, 1, s.undone[key].times)
		s.accountChanged(key, &without, nil)
		require.Empty(t, s.undone)
		require.Empty(t, s.accountsIn)
	})
}
