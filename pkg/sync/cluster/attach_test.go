package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

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

func TestTheChangeOfAServiceAccountIsAConflictWhereAnythingElseWasChanged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		patched := func(c attachment) (is corev1.ServiceAccount) {
			c.was.uid, c.was.resourceVersion = "u", "7"
			patch, err := c.patch()
			require.NoError(t, err)
			require.NoError(t, json.Unmarshal(patch, &is))
			return is
		}
		is := patched(attachment{names: []string{"a", "pull"}, remembered: []string{"pull", "x"}})
		require.Equal(t, corev1.ServiceAccount{
			ObjectMeta: metav1.ObjectMeta{UID: "u", ResourceVersion: "7", Annotations: map[string]string{
				impsync.AnnotationAttached: "pull,x", impsync.AnnotationAttachedAt: "2000-01-01T00:00:00Z",
			}},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: "a"}, {Name: "pull"}},
		}, is)
		require.Equal(t, account{uid: "u", resourceVersion: "7", pullSecrets: []string{"a", "pull"}, attached: []string{"pull", "x"}}, accountOf(&is))
		require.True(t, impsync.AttachedAt(&is).Equal(time.Now()))
		is = patched(attachment{was: account{pullSecrets: []string{"pull", "x"}}, names: []string{"pull"}, remembered: []string{"pull"}})
		require.Equal(t, map[string]string{impsync.AnnotationAttached: "pull"}, is.Annotations, "nothing was added, and the time stays as it is")
		patch, err := (&attachment{}).patch()
		require.NoError(t, err)
		require.JSONEq(t, `{"metadata":{"uid":"","resourceVersion":"","annotations":{"images.banzaicloud.io/attached":null,"images.banzaicloud.io/attached-at":null}},"imagePullSecrets":[]}`, string(patch))
	})
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
				s.claimOf(t, resource(t, "a", 0, byName), 7).problem = errors.New("x")
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
		require.Contains(t, s.accountsNamed(c).Message, "0 of 1 ServiceAccounts name the Secret; not n/sa: somebody takes the entry out")
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

// everySA selects the ServiceAccount sa, which is oneSA.
var (
	everySA = &v1alpha1.ServiceAccountSelector{Names: []string{"sa"}}
	oneSA   = types.NamespacedName{Namespace: "n", Name: "sa"}
)

// What was kept for want of knowledge is looked at once there is some.
func TestServiceAccountsAreLookedAtOnceAProblemIsSolved(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		was := newRendering(t, s)
		was.resource = resource(t, "a", 0, byName)
		was.resolved = resolve(nil, &state{}, noon)
		c := s.claimOf(t, was.resource, 7)
		selection, _, _ := impsync.CompileSelection(was.resource.Spec.Target.Namespaces, was.resource.Spec.Target.NamespacesWithPods)
		c.setRendered(was.remembers(7), selection)
		c.state = was.known
		c.outcomes["n"] = outcome{kind: delivered, counter: 7}
		s.there(c)
		c.accounts, _ = impsync.CompileAccounts(&v1alpha1.ServiceAccountSelector{Names: []string{"else"}})
		s.withAccounts(t, map[string]string{"sa": "b pull;pull"}) // it went out of the selection meanwhile
		c.problem = errors.New("x")
		require.Nil(t, s.judgeAccount(oneSA, s.now), "kept, as nothing is known")
		s.queuedAccounts()
		s.setAccounts(c, was.resource) // spec nil == nil
		require.NoError(t, s.reconcileResource(t.Context(), "uid-a"))
		require.NoError(t, c.problem)
		require.NotNil(t, s.judgeAccount(oneSA, s.now), "it is to go now")
		require.Equal(t, []string{"n"}, s.queuedAccounts(), "and somebody looks at it")
	})
}

// An outcome of the spec before is no selection.
func TestANamespaceThatIsSelectedNoMoreGetsNoEntry(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byNone), 7)
		c.accounts, _ = impsync.CompileAccounts(everySA)
		c.outcomes["n"] = outcome{kind: pending} // of the spec before, under another name
		s.withAccounts(t, map[string]string{"sa": "b old;old"})
		s.targets["old"] = nil
		require.Nil(t, s.judgeAccount(oneSA, s.now))
	})
}

// The report of a dead agent may say what no rule asks for any more.
func TestDemandWithoutPodRulesAttachesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byNone), 7)
		c.accounts, _ = impsync.CompileAccounts(everySA)
		s.demand.states[demandKey{"n", "uid-a"}] = &demandState{nodes: 1}
		s.withAccounts(t, map[string]string{"sa": "b"})
		require.Equal(t, leave, s.decides().verb, "no Secret is delivered")
		require.Nil(t, s.judgeAccount(oneSA, s.now))
	})
}

// It is gone before the watch has told.
func TestAServiceAccountThatIsGoneIsForgotten(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		c.accounts, _ = impsync.CompileAccounts(everySA)
		fake := watch.NewFake()
		sa := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "sa", UID: "sa", ResourceVersion: "5"}}
		s.accounts = impsync.NewMirror(impsync.MirrorConfig[account]{
			Name: "ServiceAccounts", Example: &corev1.ServiceAccount{}, Log: s.log, OnChange: s.accountChanged,
			Convert: func(o runtime.Object) account { return accountOf(o.(*corev1.ServiceAccount)) }, Version: func(a account) string { return a.resourceVersion },
			ListWatch: &cache.ListWatch{
				ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) {
					return &corev1.ServiceAccountList{ListMeta: metav1.ListMeta{ResourceVersion: "10"}, Items: []corev1.ServiceAccount{*sa}}, nil
				},
				WatchFuncWithContext: func(_ context.Context, o metav1.ListOptions) (watch.Interface, error) {
					if o.SendInitialEvents != nil {
						return nil, errors.New("no")
					}
					return fake, nil
				},
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.accounts.Run(ctx) }()
		defer func() { cancel(); <-done }()
		<-s.accounts.Synced()
		s.server().answers = map[string]any{"PATCH /api/v1/namespaces/n/serviceaccounts/sa": apierrors.NewNotFound(schema.GroupResource{Resource: "serviceaccounts"}, "sa")}
		require.NoError(t, s.reconcileAccounts(t.Context(), "n"))
		gone := sa.DeepCopy()
		gone.ResourceVersion = "11"
		fake.Delete(gone)
		<-time.After(time.Second)
		require.Empty(t, s.accountsIn)
	})
}

// Also why it could not be changed.
func TestWhyAServiceAccountCouldNotBeChangedIsForgottenWithIt(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byName), 7).accounts, _ = impsync.CompileAccounts(everySA)
		s.withAccounts(t, map[string]string{"sa": "b"})
		s.server().answers = map[string]any{"PATCH /api/v1/namespaces/n/serviceaccounts/sa": apierrors.NewForbidden(schema.GroupResource{Resource: "serviceaccounts"}, "sa", errors.New("policy"))}
		require.Error(t, s.reconcileAccounts(t.Context(), "n"))
		s.accountChanged(oneSA, &account{uid: "sa"}, nil)
		require.Empty(t, s.refused)
	})
}

// A webhook takes the entry out in the very write.
func TestAWebhookThatTakesTheEntryOutIsNotFought(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byName), 7).accounts, _ = impsync.CompileAccounts(everySA)
		s.withAccounts(t, map[string]string{"sa": "b"})
		s.server().answers = map[string]any{"PATCH /api/v1/namespaces/n/serviceaccounts/sa": &corev1.ServiceAccount{
			TypeMeta:         metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceAccount"},
			ObjectMeta:       metav1.ObjectMeta{Namespace: "n", Name: "sa", UID: "sa", ResourceVersion: "6", Annotations: map[string]string{impsync.AnnotationAttached: "pull"}},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: "b"}},
		}}
		writes := 0
		for range 10 {
			_ = s.reconcileAccounts(t.Context(), "n")
			writes += len(s.server().asked())
			<-time.After(time.Minute)
		}
		require.LessOrEqual(t, writes, 12)
	})
}

// A tool puts back what was attached under another name.
func TestAToolThatPutsAnOldEntryBackIsNotFought(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byName), 7).accounts, _ = impsync.CompileAccounts(everySA)
		s.withAccounts(t, map[string]string{"sa": "b other;other"})
		ours := account{uid: "sa", resourceVersion: "20", pullSecrets: []string{"b", "pull"}, attached: []string{"pull"}}
		theirs := account{uid: "sa", resourceVersion: "21", pullSecrets: []string{"b", "other"}, attached: []string{"other"}}
		for range 20 {
			s.accountChanged(oneSA, &ours, &theirs)
		}
		require.Equal(t, 20, s.undone[oneSA].times)
		require.Nil(t, s.judgeAccount(oneSA, time.Now()), "it waits")
	})
}

// A tool puts in an entry that nobody wants, with the annotation.
func TestAToolThatPutsAnEntryInInOurNameIsNotFought(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.withAccounts(t, map[string]string{"sa": "b other;other"}) // nobody wants it
		ours := account{uid: "sa", resourceVersion: "20", pullSecrets: []string{"b"}}
		theirs := account{uid: "sa", resourceVersion: "21", pullSecrets: []string{"b", "other"}, attached: []string{"other"}}
		for range 20 {
			s.accountChanged(oneSA, &ours, &theirs)
		}
		require.NotEmpty(t, s.undone)
		require.Nil(t, s.judgeAccount(oneSA, time.Now()), "it waits")
	})
}

// A new leader tells nothing before it has read the ServiceAccounts.
func TestTheStatusOfANewLeaderWaitsForTheServiceAccounts(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		c.accounts, _ = impsync.CompileAccounts(everySA)
		c.outcomes["n"] = outcome{kind: delivered, counter: 7}
		s.withAccounts(t, map[string]string{"sa": "b pull;pull"})
		r.Status = s.statusOf(r, c, s.summarize(c))
		require.Equal(t, v1alpha1.StatusReady, r.Status.Status)
		s.accounts = impsync.NewMirror(impsync.MirrorConfig[account]{}) // the next leader, whose list is under way
		_ = s.reconcileStatus(t.Context(), "uid-a")
		require.Empty(t, s.server().asked())
	})
}

// The right is taken away while it leads.
func TestTheRightToReadServiceAccountsIsTakenAway(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		c.accounts, _ = impsync.CompileAccounts(everySA)
		c.outcomes["n"] = outcome{kind: delivered, counter: 7}
		forbidden := apierrors.NewForbidden(schema.GroupResource{Resource: "serviceaccounts"}, "", errors.New("rbac"))
		listed := false
		s.accounts = impsync.NewMirror(impsync.MirrorConfig[account]{
			Name: "ServiceAccounts", Example: &corev1.ServiceAccount{}, Log: s.log, OnChange: s.accountChanged,
			Convert: func(o runtime.Object) account { return accountOf(o.(*corev1.ServiceAccount)) }, Version: func(a account) string { return a.resourceVersion },
			ListWatch: &cache.ListWatch{
				ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) {
					if listed {
						return nil, forbidden
					}
					listed = true
					return &corev1.ServiceAccountList{ListMeta: metav1.ListMeta{ResourceVersion: "10"}}, nil
				},
				WatchFuncWithContext: func(context.Context, metav1.ListOptions) (watch.Interface, error) { return nil, forbidden },
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.accounts.Run(ctx) }()
		defer func() { cancel(); <-done }()
		<-s.accounts.Synced()
		<-time.After(time.Minute)
		require.Error(t, s.accounts.Err())
		require.Equal(t, metav1.ConditionFalse, s.accountsNamed(c).Status)
	})
}

// More of the same is no other cause.
func TestAnEventAboutServiceAccountsIsNoNumber(t *testing.T) {
	why := func(n int) string {
		failed := make([]string, n)
		for i := range failed {
			failed[i] = "n/sa: no"
		}
		_, cause := eventOf(metav1.Condition{Type: v1alpha1.ConditionServiceAccountsReady, Status: metav1.ConditionFalse, Message: "0 of 9 ServiceAccounts name the Secret; not " + listed(failed)}, summary{})
		return cause
	}
	require.Equal(t, why(7), why(8))
}

// No source has given anything yet: a name without a Secret costs nothing, and what is there stays.
func TestServiceAccountsAreAttachedBeforeThereAreCredentials(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := newClaim(r, impsync.Rendered{})
		c.state = &state{}
		s.byUID[r.UID] = r
		s.putClaim(c)
		c.accounts, _ = impsync.CompileAccounts(everySA)
		s.withAccounts(t, map[string]string{"sa": "b", "old": "b pull;pull"})
		r.Spec.Registry.Credentials = []v1alpha1.CredentialSource{{Name: "hub", Namespace: "not-allowed"}}
		require.NoError(t, s.reconcileResource(t.Context(), r.UID))
		c.accounts, _ = impsync.CompileAccounts(&v1alpha1.ServiceAccountSelector{Names: []string{"sa", "old"}})
		require.Nil(t, s.judgeAccount(types.NamespacedName{Namespace: "n", Name: "old"}, s.now), "what is there stays")
		require.Equal(t, []string{"b", "pull"}, s.judgeAccount(oneSA, s.now).names, "before the Secret")
	})
}

// A leader that begins with a spec that has a problem takes nothing out.
func TestARestartWithABadSpecTakesNothingOut(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		bad := resource(t, "a", 0, `{secret: {name: nope}, namespaces: {names: ["n"]}}`)
		bad.Generation = 2
		s.byUID[bad.UID] = bad
		c.settled, c.unread = 0, true
		s.setAccounts(c, bad)
		s.withAccounts(t, map[string]string{"sa": "b pull;pull"})
		require.Nil(t, s.judgeAccount(oneSA, s.now))
	})
}

// Too many requests are no failure yet.
func TestServiceAccountsThatAreThrottledAreNotRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		c.accounts, _ = impsync.CompileAccounts(everySA)
		c.outcomes["n"] = outcome{kind: delivered, counter: 7}
		s.withAccounts(t, map[string]string{"sa": "b"})
		s.server().answers = map[string]any{"PATCH /api/v1/namespaces/n/serviceaccounts/sa": apierrors.NewTooManyRequests("slow down", 0)}
		require.Error(t, s.reconcileAccounts(t.Context(), "n"))
		require.NotEqual(t, metav1.ConditionFalse, s.accountsNamed(c).Status, s.accountsNamed(c).Message)
	})
}
